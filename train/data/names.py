"""What the names of files and folders tell before anybody looks into them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: of files that are taken for images unread; others only if their content says so
IMAGES = _words(
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .webp .ppm .pgm .pbm .pnm .pfm"
    " .tif .tiff .jp2 .j2k .jpx .jpf .j2c .jpc .avif .avifs"
)
#: of pictures that are not read: a set that has some is not complete without
UNREAD = _words(
    ".heic .heif .hif .jxl .jxr .psd .psb .xcf .svg .svgz .ai .eps .exr .hdr .tga .ico"
    " .dds .pcx .dcm .dicom .fits .qoi .bpg .flif .wmf .emf .sgi .ras .xbm .xpm"
)
#: the same; they begin as TIFF does, whose pixels would be those of a small preview
RAW = _words(
    ".dng .cr2 .cr3 .crw .nef .nrw .arw .sr2 .srf .raf .orf .rw2 .rwl .pef .srw .3fr"
    " .fff .iiq .kdc .dcr .mrw .x3f .erf .mef .mos"
)

# Of file managers, backups, NAS, archives and version control, in lower case.
_TOOLS = _words(
    "__macosx __pycache__ lost+found @eadir @recycle @recently-snapshot @__thumb @tmp"
    " @sharebin @sharesnap #recycle #snapshot $recycle.bin ~snapshot"
    " thumbs.db thumbs.db:encryptable ehthumbs.db ehthumbs_vista.db"
    " desktop.ini"
) | {"icon\r", "system volume information", "network trash folder"}
_DRAFTS = (".part", ".crdownload", ".download", ".tmp", ".swp", "~")


def suffix(name: str) -> str:
    """Returns what follows the last dot, with it, in lower case; "" where there is
    none."""
    stem, dot, end = name.rpartition(".")
    return (dot + end).lower() if stem else ""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: hidden, as AppleDouble's ``._x``
    is, made by a tool, or a download that did not end."""
    name = name.lower()
    draft = len(name) > 1 and name.endswith(_DRAFTS)
    return draft or name.startswith(".") or name in _TOOLS


def alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """Returns pairs of different names that look the same, or are the same to other
    file systems: by case, by Unicode's composed and decomposed forms, by spaces."""
    seen: dict[str, str] = {}
    pairs = []
    for name in names:
        other = seen.setdefault(plain(name), name)
        if other != name:
            pairs.append((other, name))
    return pairs


def plain(name: str) -> str:
    """Returns what names that look the same have in common."""
    return unicodedata.normalize("NFC", name).lower().strip()


def unprintable(name: str) -> bool:
    """Whether a name has control characters, or bytes that are no UTF-8."""
    return any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)
