"""Values of extended attributes with a binary form: file capabilities and POSIX ACLs.

Both layouts are the kernel's own: `struct vfs_ns_cap_data` of linux/capability.h (revision 2) and
`struct posix_acl_xattr_header` with its entries of linux/posix_acl_xattr.h, all little endian.
"""

import struct
from typing import Final

CAPABILITY: Final = b"security.capability"
ACL_ACCESS: Final = b"system.posix_acl_access"
ACL_DEFAULT: Final = b"system.posix_acl_default"

CAP_NET_BIND_SERVICE: Final = 10
CAP_NET_RAW: Final = 13
CAP_SYS_PTRACE: Final = 19

_REVISION_2: Final = 0x02000000
_EFFECTIVE: Final = 1
_NO_ID: Final = 0xFFFFFFFF
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20


def file_capability(*permitted: int, effective: bool = True) -> bytes:
    """The `security.capability` value that grants the capabilities with these numbers."""
    bits = sum(1 << number for number in permitted)
    return struct.pack(
        "<IIIII",
        _REVISION_2 | (_EFFECTIVE if effective else 0),
        bits & 0xFFFFFFFF,
        0,
        bits >> 32,
        0,
    )


def posix_acl(
    *,
    owner: int,
    group: int,
    other: int,
    users: dict[int, int] | None = None,
    groups: dict[int, int] | None = None,
    mask: int = 7,
) -> bytes:
    """An ACL value: permissions (0-7) of the owning classes and of further users and groups by id.

    `owner` and `other` should agree with the file's mode and `mask` with the mode's group bits;
    the kernel sets the mode from the ACL when it is written.
    """
    entries = [(_USER_OBJ, owner, _NO_ID)]
    entries += [(_USER, rights, uid) for uid, rights in sorted((users or {}).items())]
    entries.append((_GROUP_OBJ, group, _NO_ID))
    entries += [(_GROUP, rights, gid) for gid, rights in sorted((groups or {}).items())]
    entries.append((_MASK, mask, _NO_ID))
    entries.append((_OTHER, other, _NO_ID))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
