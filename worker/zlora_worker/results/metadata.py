"""A recipe inside its picture: what programs that read pictures expect, and all of it as JSON.

PNG has the text chunks `parameters` (the infotext) and `zlora` (the JSON). JPEG and WebP have the infotext as Exif's
UserComment, in the form that A1111 gives it, and the JSON in an XMP packet (ISO 16684-1).
"""

import struct
from typing import Any, Final

import msgspec
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from zlora.schema import OutputFormat

from zlora_worker.results.provenance import Provenance, parse_provenance

PARAMETERS: Final = "parameters"
JSON: Final = "zlora"

_ROOM: Final = 65_000  # bytes that a JPEG segment holds, less what Pillow writes around
_UNICODE: Final = b"UNICODE\0"  # Exif 2.3, 4.6.5: the code of a UserComment; A1111 writes it as UTF-16, big end first
_LONG, _UNDEFINED = 4, 7  # types of a TIFF's entries
_OPENING: Final = b"<zlora:recipe>"
_CLOSING: Final = b"</zlora:recipe>"
_XMP: Final = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    f'xmlns:zlora="urn:x-zlora:1">{_OPENING.decode()}{{}}{_CLOSING.decode()}</rdf:Description></rdf:RDF></x:xmpmeta>'
    '<?xpacket end="w"?>'
)
_SPELT: Final = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\ufffe\uffff"}


def embed_metadata(recipe: Provenance, text: str, output_format: OutputFormat) -> dict[str, Any]:
    """What Pillow's `save` takes so that the file says what it is; what a JPEG has no room for is left out."""
    document = msgspec.json.encode(recipe)
    if output_format == "png":
        chunks = PngInfo()
        chunks.add_text(PARAMETERS, text)
        chunks.add_itxt(JSON, document.decode())
        return {"pnginfo": chunks}
    packet, exif = _packet(document), _exif(text)
    if output_format == "jpeg":
        return {
            name: data for name, data in (("xmp", packet), ("exif", exif)) if len(data) <= _ROOM
        }
    return {"xmp": packet, "exif": exif}


def provenance_of(picture: Image.Image) -> Provenance | None:
    """What an opened picture says of itself, whoever wrote it; None where it does not.

    Raises `msgspec.DecodeError`, or its kind `msgspec.ValidationError`, for what `read_recipe` does not take.
    """
    document = picture.info.get(JSON)
    if document is None:
        document = _in_xmp(picture.info.get("xmp"))
    return parse_provenance(document) if isinstance(document, bytes | str) else None


def _in_xmp(packet: object) -> bytes | None:
    """Found by its tags, with no parser: entities of a stranger's XML expand to anything."""
    if isinstance(packet, str):  # a PNG may have a text chunk of that name
        packet = packet.encode(errors="replace")
    if not isinstance(packet, bytes):
        return None
    document, end, _ = packet.partition(_OPENING)[2].partition(_CLOSING)
    return document if end else None


def _exif(text: str) -> bytes:
    """By hand: Pillow gives the comment the type of a number, and readers then take it for numbers."""
    comment = _UNICODE + text.encode("utf-16-be")
    first = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, _LONG, 1, 26, 0)
    second = struct.pack(">HHHIII", 1, ExifTags.Base.UserComment, _UNDEFINED, len(comment), 44, 0)
    return b"Exif\0\0MM\0*\0\0\0\x08" + first + second + comment


def _packet(document: bytes) -> bytes:
    """JSON has the characters that XML has not as they are in texts only, where they may be spelt by their numbers."""
    return _XMP.format(document.decode().translate(_SPELT)).encode()
