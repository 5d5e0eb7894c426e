"""The graph root: containers/storage on disk, shared with Podman, Buildah, Skopeo and CRI-O."""
