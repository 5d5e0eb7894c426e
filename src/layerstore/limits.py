"""Every bound of layerstore, named, with its unit.

A bound stands here once and is imported by the module that holds it, so that
"what is the largest X" has one answer.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# -- this process --------------------------------------------------------------
GARBAGE_OBJECTS: Final = 50_000  # new ones before the interpreter looks for garbage among them

# -- images -------------------------------------------------------------------
MANIFEST_BYTES: Final = 4 * MIB  # OCI distribution specification: clients need not take more
CONFIG_BYTES: Final = 16 * MIB
INDEX_MANIFESTS: Final = 256  # entries of one image index
MANIFEST_LAYERS: Final = 512  # overlay mounts at most 500 lower directories
ANNOTATIONS: Final = 1024  # entries of one annotation map
REFERENCE_CHARS: Final = 1024  # whole reference text
REPOSITORY_CHARS: Final = 255  # distribution reference grammar
TAG_CHARS: Final = 128

# -- layer formats -------------------------------------------------------------
TOC_BYTES: Final = 150 * MIB  # as containers/storage, compressed and uncompressed
TOC_ENTRIES: Final = 4_000_000
TOC_ENTRY_BYTES: Final = 4 * MIB  # JSON text of one entry
PATH_BYTES: Final = 4096
NAME_BYTES: Final = 255
PATH_DEPTH: Final = 2048  # components of one path
SYMLINK_BYTES: Final = 4095  # PATH_MAX without its NUL
XATTR_VALUE_BYTES: Final = 64 * KIB  # XATTR_SIZE_MAX
XATTR_NAME_BYTES: Final = 255
XATTRS_PER_FILE: Final = 1024
XATTRS_BYTES_PER_FILE: Final = 1 * MIB
FILE_BYTES: Final = 1 << 60
CHUNK_BYTES: Final = (
    256 * MIB
)  # uncompressed bytes of one chunk: it is held in memory to be verified
MEMBER_BYTES: Final = 512 * MIB  # uncompressed bytes taken out of one member
MEMBER_HELD_BYTES: Final = 64 * MIB  # longer ones are read as a stream, chunk by chunk
HOLE_PIECES: Final = 1 << 20  # GiB of holes in the files of one layer
MEMBER_SLACK_BYTES: Final = (
    64 * MIB
)  # headers and padding that may follow the last payload of a member
INDEX_ENTRY_BITS: Final = 24  # entry number inside a layer, part of the node id
TAR_EXTENDED_HEADER_BYTES: Final = 16 * MIB  # one PAX or GNU long name record
SPARSE_MAP_BYTES: Final = 1 * MIB  # before the payload of one sparse file; as in Go

# -- registry ------------------------------------------------------------------
CONNECT_SECONDS: Final = 10.0
READ_SECONDS: Final = 30.0  # silence on one connection
TOKEN_BYTES: Final = 1 * MIB
TOKEN_MIN_SECONDS: Final = 60  # distribution token specification: default and lower bound
TOKEN_RENEW_RETRY_SECONDS: Final = 10.0  # a token that could not be renewed in time is used on
ERROR_BODY_BYTES: Final = 64 * KIB
REDIRECTS: Final = 5
ATTEMPTS: Final = 5  # of one request, the first included
BACKOFF_FIRST_SECONDS: Final = 0.2
BACKOFF_MAX_SECONDS: Final = 10.0
RETRY_AFTER_MAX_SECONDS: Final = 30.0
CONNECTIONS_PER_HOST: Final = 32  # kept open when idle; more may be in use for a while
HELPER_SECONDS: Final = 10.0  # one run of a credential helper
CONFIG_FILE_BYTES: Final = 4 * MIB  # one auth.json or registries.conf
TOKENS: Final = 1024  # tokens, challenges and preferred endpoints remembered
HOSTS: Final = 32  # registries whose connections and certificates are kept
REDIRECT_SECONDS: Final = 60.0  # a blob's redirect target is used again this long
REDIRECT_ENTRIES: Final = 4096
PREFERRED_SECONDS: Final = 60.0  # blobs are asked of the place that gave the manifest so long
ENDPOINT_REST_SECONDS: Final = 30.0  # a mirror that failed to answer is asked last for so long

# -- content and fetching --------------------------------------------------------
TOC_TAIL_MIN_BYTES: Final = 64 * KIB  # first guess for footer and TOC in one request: at least
TOC_TAIL_MAX_BYTES: Final = 2 * MIB  # at most
WHOLE_BLOB_BYTES: Final = 4 * MIB  # taken whole at a lookup where the registry ignores ranges
PREFETCH_RANGE_BYTES: Final = 8 * MIB
BACKGROUND_RANGE_BYTES: Final = 32 * MIB
DEMAND_RANGE_FIRST_BYTES: Final = 512 * KIB  # one on-demand range before the link is measured
DEMAND_RANGE_MIN_BYTES: Final = 256 * KIB  # on a slow link
DEMAND_RANGE_PACED_BYTES: Final = 2 * MIB  # on a fast one
DEMAND_RANGE_MAX_BYTES: Final = 8 * MIB  # the window grows to this while reads are sequential
DEMAND_STEAL_BYTES: Final = 512 * KIB  # waiting this far behind a running fetch beats a new request
FETCH_WORKERS: Final = 8
FETCH_RELIEF_WORKERS: Final = 56  # more for reads on demand while the others are stuck
FETCH_RELIEF_SECONDS: Final = 2.0  # they come when no read was begun for so long
FETCH_PREFETCH_WORKERS: Final = 2
FETCH_BACKGROUND_WORKERS: Final = 1
FETCH_ATTEMPTS: Final = 4  # of one range whose answers are broken or contradict themselves
ANSWER_FIRST_SECONDS: Final = 10.0  # for the head of an answer; doubled at each try, up to
ANSWER_MAX_SECONDS: Final = READ_SECONDS
OUTAGE_WAIT_SECONDS: Final = 300.0  # a read waits so long for a registry that gives no answer
OUTAGE_WAIT_MAX_SECONDS: Final = 86_400.0  # may be configured
OUTAGE_FAIL_SECONDS: Final = 10.0  # it is tried so long where reads are to fail instead
OUTAGE_PROBE_SECONDS: Final = 5.0  # longest pause between two tries while reads wait
OUTAGE_IDLE_SECONDS: Final = 30.0  # and while only background work does
OUTAGE_SUSPECT_SECONDS: Final = 5.0  # without an answer, before no more requests are sent
OUTAGE_PROBE_LOST_SECONDS: Final = READ_SECONDS + 5.0  # a try that never ended is given up
BACKGROUND_QUIET_SECONDS: Final = 2.0  # without demand before background work goes on
BACKGROUND_PAUSE_SECONDS: Final = 5.0  # longest rest in the middle of a response
BACKGROUND_RETRY_SECONDS: Final = 15.0  # after a failure, doubled up to
BACKGROUND_RETRY_MAX_SECONDS: Final = 120.0
STREAM_BYTES: Final = 256 * KIB  # taken from a connection at once, at most
JOIN_POLL_SECONDS: Final = 0.02
HELD_BYTES: Final = 64 * MIB  # of contents in memory while the disk takes nothing
HELD_UNIT_BYTES: Final = 16 * MIB  # of the blob in one piece of them; longer ones are streamed
HELD_AHEAD_BYTES: Final = 16 * MIB  # uncompressed, kept beyond what was asked for
HELD_RANGE_BYTES: Final = 1 * MIB  # one on-demand range while the disk takes nothing
HELD_TRIES: Final = 4  # of a read whose bytes left the memory before it was their turn
FULL_DISK_SECONDS: Final = 5.0  # a disk that took nothing is tried again after so long
FULL_DISK_ROOM_BYTES: Final = 16 * MIB  # it must have so much free then
FULL_DISK_PROBE_BYTES: Final = 256 * KIB  # and take a file of this size
OPEN_FILES: Final = 65_536  # descriptors of the service, where permitted
OPEN_OBJECTS: Final = 512  # file descriptors kept for objects
SYNC_SECONDS: Final = 15.0  # a power failure makes suspect what was written in about this time
STATE_BACKUP_SECONDS: Final = 60.0  # the state is copied no more often than this
SYNC_STOP_SECONDS: Final = 1.0  # the end of the service waits so long for the disk

# -- provider ------------------------------------------------------------------
RESOLVE_SECONDS: Final = 25.0  # a lookup of `diff` is answered by then
RESOLVE_QUEUE: Final = 256  # lookups waiting for a resolver
RESOLVE_QUEUE_SHARE: Final = 128  # of them for one registry
RESOLVE_WORKERS: Final = 8
RESOLVE_SILENT: Final = 4  # of them may wait for a registry that says nothing
RESOLVE_TURN_SECONDS: Final = 0.2  # then the next ones look whether it is their turn
REFRESHED: Final = 1024  # references of which is known when they were resolved
REFRESH_SECONDS: Final = 2.0  # a reference is not resolved again sooner than this
FAILURE_SECONDS: Final = 5.0  # a failed resolution is remembered this long at most
UNREACHABLE_SECONDS: Final = 15.0  # lookups of an image whose registry gave no answer rest so long
TRANSIENT_NAMES: Final = 16_384  # reference and layer names remembered without a layer
EXTERNAL_TOC_SECONDS: Final = 30.0  # the contents of an image of TOCs are remembered so long
CHECKPOINT_MIN_BYTES: Final = 8 * MIB  # of a gzip blob in which places to enter are looked for
EAGER_SECONDS: Final = 15.0  # a lookup waits so long for an ordinary layer, if told to wait
EAGER_SECONDS_MAX: Final = RESOLVE_SECONDS - 1.0
INGEST_WORKERS: Final = 4  # ordinary layers that somebody waits for, at once
INGEST_QUEUE: Final = 1024  # ordinary layers to be fetched in the background
INGEST_FAILED_SECONDS: Final = 60.0  # a layer whose fetch failed is not tried again sooner
INDEX_FILE_BYTES: Final = 1024 * MIB  # an index, or checkpoints, out of a file of indexes
DISK_KEEP_FREE: Final = 0.1  # of the file system stays free of what is fetched ahead
DISK_HIGH: Final = 0.9  # of the limit: eviction begins, and nothing more is fetched ahead
DISK_LOW: Final = 0.75  # of the limit: eviction ends
DISK_LIMIT_MIN_BYTES: Final = 16 * MIB  # no limit may be below
DISK_BLOCK_BYTES: Final = 4096  # files are counted in such blocks
DISK_COUNT_BYTES: Final = 64 * MIB  # written before it is noted down how much is used
DISK_UNCOUNTED_BYTES: Final = 16 * MIB  # of the limit, at most, are left to what is not counted
DISK_FULL_BYTES: Final = 1024 * MIB  # room that is made, at most, when the disk itself is full
DISK_FULL_MIN_BYTES: Final = 64 * MIB  # and at least
EVICTION_WAIT_SECONDS: Final = 10.0  # a read on demand waits so long for room on the disk
EVICTION_REST_SECONDS: Final = 5.0  # after no more room could be made nobody waits for it
EVICTION_PAUSE_SECONDS: Final = 1.0  # between looks at who wants room
EVICTION_YOUNG_SECONDS: Final = 10.0  # files of running containers are not evicted sooner
DISK_LOOK_SECONDS: Final = 60.0  # between looks at the disk and at what was used
DISK_MEASURE_SECONDS: Final = 900.0  # between measurements of all that is stored
RECENCY_SECONDS: Final = 600.0  # when a layer was last used is noted down this exactly
IN_USE_LOOK_SECONDS: Final = (
    1.0  # a look at graph roots that found no use of a layer is good so long
)
PULL_SECONDS: Final = 600.0  # a layer that a client has just taken counts as used so long
RETURN_SHARE: Final = 0.25  # of an evicted layer is read before all of it is fetched again
CHECK_FINDINGS: Final = 10_000  # of a check of the cache that are listed
FETCH_JOBS: Final = 64  # of `layerstore fetch` that are remembered

# -- file system -----------------------------------------------------------------
READ_ANSWER_SECONDS: Final = 120.0  # a read is answered by then, with EIO if need be
BLOB_ANSWER_SECONDS: Final = 3600.0  # a read of `blob` waits for the whole blob
RESOLVE_ANSWER_SECONDS: Final = RESOLVE_SECONDS + 2.0  # a lookup is answered by then, with ENOENT
CONTROL_VALID_SECONDS: Final = 60  # the kernel keeps names of known references and layers so long
BLOB_NAME_SECONDS: Final = 1  # and what is below such a layer by blob digest: a reload may end it
IO_WORKERS: Final = 4  # threads that wait for the local disk
IO_QUEUE: Final = 65_536
READ_ERROR_LOG_SECONDS: Final = 10.0  # one line a file in this time
CONTROL_REQUEST_BYTES: Final = 64 * KIB
CONTROL_ANSWER_BYTES: Final = 64 * MIB
CONTROL_CONNECTIONS: Final = 32
CONTROL_SECONDS: Final = 10.0
CONTROL_DISK_SECONDS: Final = 600.0  # looking at all that is stored, and removing it

# -- keeper and server ------------------------------------------------------------
KEEPER_MESSAGE_BYTES: Final = 128 * KIB
KEEPER_MOUNTS: Final = 80  # held by one keeper: the mount, and detached ones with users
KEEPER_CLIENTS: Final = 16  # connections to its socket
KEEPER_TRIAL_SECONDS: Final = 20.0  # one trial run of its new code, while it does nothing else
SERVER_PREPARE_SECONDS: Final = 60.0  # a new server has imported and checked everything by then
SERVER_START_SECONDS: Final = 300.0  # and has opened its state, be the disk ever so slow
SERVER_STOP_SECONDS: Final = 10.0  # an old one has let go of its state by then, or is killed
SERVER_LOCK_SECONDS: Final = 5.0  # a new one waits so long for the state
SERVER_STEADY_SECONDS: Final = 1.0  # one that served so long did not die at once
SERVER_SILENT_SECONDS: Final = 30.0  # one whose loops do not come round for so long is replaced
SERVER_SILENT_MIN_SECONDS: Final = 1.0
SERVER_SILENT_MAX_SECONDS: Final = 3600.0
SPARE_SECONDS: Final = 2.0  # after a start the next server is made ready
SPARE_RETRY_SECONDS: Final = 30.0  # if one that waits was killed
RESTART_FIRST_SECONDS: Final = 0.1  # before the second start in a row that failed, doubled up to
RESTART_MAX_SECONDS: Final = 10.0
HANDOVER_SECONDS: Final = 30.0  # verbs wait so long for a service that changes its server
TROUBLE_SECONDS: Final = 10.0  # and so long for one whose servers come to nothing, time and again

# -- graph root ------------------------------------------------------------------
LAYER_ENTRIES: Final = 4_000_000  # entries of one layer's tar archive
LAYER_OWNERS: Final = 65_536  # users, and groups, of one layer: its record lists them
DIRECTORY_NAMES_BYTES: Final = 256 * MIB  # paths of one layer's directories, kept for their times
OPTIONAL_ATTRIBUTES_BYTES: Final = 64 * MIB  # of one layer that is checked
LAYER_BYTES: Final = 16 * 1024 * 1024 * MIB  # uncompressed tar stream of one layer
TAR_TRAILER_BYTES: Final = 64 * MIB  # kept of what follows the end of an archive
OPEN_DIRECTORIES: Final = 64  # descriptors kept by the extraction of one layer
STAGE_PIECE_BYTES: Final = 1 * MIB  # of a layer, handed from thread to thread
LARGE_FILE_BYTES: Final = 256 * KIB  # is written, or stored, beside the making of small files
STAGE_PIECES: Final = 4  # waiting for the next thread
LOCK_SHARE_SECONDS: Final = 0.1  # so long readers may join others, then they queue up anew
LOCK_RETRY_SECONDS: Final = 0.01  # after the kernel took a wait for a deadlock
RECORDS_BYTES: Final = 256 * MIB  # one layers.json, images.json or containers.json
BIG_DATA_BYTES: Final = 256 * MIB  # one big data item; a zstd:chunked manifest is the largest
STORAGE_CONF_BYTES: Final = 4 * MIB  # one storage.conf
LAYER_INFO_BYTES: Final = 1 * MIB  # `info` of a layer in an additional layer store
UNUSED_LAYER_SECONDS: Final = 3600.0  # a younger layer may belong to a pull that is under way
LAYER_STORE_SECONDS: Final = RESOLVE_ANSWER_SECONDS + 3.0  # a store has for one lookup
REPAIR_WAYS: Final = 64  # chains of ids followed at once when layer records are made again
RETIRED_SECONDS: Final = 600.0  # a layer of a published store stays so long after its image
ORPHAN_SECONDS: Final = 3600.0  # a layer may be in the memory of its puller so long
REPAIR_QUIET_SECONDS: Final = 0.5  # without a release, before records are looked through
REPAIR_PATIENCE_SECONDS: Final = 10.0  # at most, while releases go on
REPAIR_RUN_SECONDS: Final = 600.0  # one process that makes records again
REPAIR_COMPLAINTS: Final = 1024  # images whose failure is remembered
OVERLAY_LOWERS: Final = 500  # the kernel's OVL_MAX_STACK
MOUNT_PROGRAM_SECONDS: Final = 60.0  # one run of fuse-overlayfs or fusermount3

# -- copying -----------------------------------------------------------------------
PULL_PARALLEL: Final = 6  # layers of an image under way at once, as containers/image
PULL_ATTEMPTS: Final = 4  # of an image whose layers others remove meanwhile
STAGE_ATTEMPTS: Final = 4  # of a layer whose staging directory others remove
SPOOL_MIN_BYTES: Final = 1 * MIB  # blobs from this size on are kept while they come
SPOOL_SECONDS: Final = 7 * 86400.0  # what has come of a blob is kept so long
ARCHIVE_MEMBERS: Final = 65_536  # files of one image archive
ARCHIVE_BYTES: Final = 256 * 1024 * MIB  # of an archive or a layer in one, unpacked
SIGNATURES: Final = 128  # of one manifest
SIGNATURE_BYTES: Final = 4 * MIB
INDEX_NESTING: Final = 4  # indexes inside indexes
GPG_SECONDS: Final = 30.0  # one run of gpg
POLICY_BYTES: Final = 4 * MIB  # policy.json, a key file, a file of registries.d
