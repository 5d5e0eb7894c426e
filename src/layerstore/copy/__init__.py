"""Moving images between registries, storages and files, and changing them on the way."""
