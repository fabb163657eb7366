"""Metadata inside an image file: the infotext that other tools read, and the provenance as JSON.

PNG has the text chunks `parameters` (the infotext) and `zlora` (the JSON). All other formats have
the infotext as Exif's UserComment, as AUTOMATIC1111 writes it, and the JSON in an XMP packet
(ISO 16684-1).
"""

import struct
from typing import Any, Final

import msgspec
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from zlora.schema import OutputFormat

from zlora_worker.results.provenance import ImageProvenance, parse_provenance

_INFOTEXT_CHUNK: Final = "parameters"
_JSON_CHUNK: Final = "zlora"

SHEET_COMMENT: Final = b"z-image-lora: contact sheet"  # in JPEG's own segment for comments

_JPEG_SEGMENT: Final = 65_000  # bytes that a segment holds beside Pillow's own header in it
# Exif 2.3, 4.6.5: the code of a UserComment; AUTOMATIC1111 writes UTF-16, big end first.
_UNICODE: Final = b"UNICODE\0"
_LONG, _UNDEFINED = 4, 7  # types of TIFF entries
_OPENING: Final = b"<zlora:recipe>"
_CLOSING: Final = b"</zlora:recipe>"
_XMP: Final = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
    f' xmlns:zlora="urn:x-zlora:1">{_OPENING.decode()}{{}}{_CLOSING.decode()}</rdf:Description>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
# Characters that XML reserves or lacks stand in JSON only within strings, which may escape them.
_ESCAPES: Final = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\ufffe\uffff"}


def embed_metadata(
    provenance: ImageProvenance, infotext: str, output_format: OutputFormat
) -> dict[str, Any]:
    """Return the options of Pillow's `save` that write the metadata.

    What exceeds a JPEG's segment is left out.
    """
    document = msgspec.json.encode(provenance)
    if output_format == "png":
        chunks = PngInfo()
        chunks.add_text(_INFOTEXT_CHUNK, infotext)
        chunks.add_itxt(_JSON_CHUNK, document.decode())
        return {"pnginfo": chunks}
    xmp = _XMP.format(document.decode().translate(_ESCAPES)).encode()
    options = {"xmp": xmp, "exif": _exif(infotext)}
    if output_format == "jpeg":
        return {name: data for name, data in options.items() if len(data) <= _JPEG_SEGMENT}
    return options


def provenance_of(image: Image.Image) -> ImageProvenance | None:
    """Return the provenance in an opened image's metadata, None if there is none.

    Raises `msgspec.DecodeError` as `parse_provenance` does: the file may come from anyone.
    """
    document = image.info.get(_JSON_CHUNK)
    if document is None:
        document = _in_xmp(image.info.get("xmp"))
    return parse_provenance(document) if isinstance(document, bytes | str) else None


def is_sheet(image: Image.Image) -> bool:
    """Return whether an opened image is the contact sheet of a sweep."""
    return image.info.get("comment") == SHEET_COMMENT


def _in_xmp(packet: object) -> bytes | None:
    """Return the JSON between its tags, without an XML parser: entities can expand without end."""
    if isinstance(packet, str):  # a text chunk of a PNG may have this name
        packet = packet.encode(errors="replace")
    if not isinstance(packet, bytes):
        return None
    document, closing, _ = packet.partition(_OPENING)[2].partition(_CLOSING)
    return document if closing else None


def _exif(infotext: str) -> bytes:
    """Return an Exif block with the infotext as UserComment.

    Pillow would write the comment with the type of a number, which readers take for numbers.
    """
    comment = _UNICODE + infotext.encode("utf-16-be")
    first = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, _LONG, 1, 26, 0)
    second = struct.pack(">HHHIII", 1, ExifTags.Base.UserComment, _UNDEFINED, len(comment), 44, 0)
    return b"Exif\0\0MM\0*\0\0\0\x08" + first + second + comment
