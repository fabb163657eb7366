"""References to LoRAs on Hugging Face and Civitai as people write and paste them, and the URLs behind them."""

import re
from typing import Final, NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

import msgspec
from msgspec import Struct

from zlora.errors import LoraNotAllowed, LoraNotFound, NotSafetensors
from zlora.redaction import without_secrets

HUGGING_FACE: Final = "https://huggingface.co"
CIVITAI: Final = "https://civitai.com"
PUBLIC: Final = frozenset(
    {HUGGING_FACE, CIVITAI}
)  # reached as any address is; an operator's own may be private
_HUBS: Final = ("https://hf.co",)  # other names of the two
_CIVITAIS: Final = ("https://www.civitai.com",)
MAX_LISTING: Final = 8 * 2**20  # bytes of a repository's list of files
_REVISION_LAST: Final = re.compile(
    r"hf://((?:(?:model|dataset|space)s/)?+[^/@]+/[^/@]+)/(.+)@([^@]+)"
)
_VERSION: Final = re.compile(r"civitai://([0-9]{1,12})(\?.*)?")
_COMMIT: Final = re.compile("[0-9a-f]{40,64}")
_SHOWN: Final = 5  # file names in a message


class HubFile(NamedTuple):
    """A file of a repository; without a path the one LoRA that the repository has."""

    kind: str
    repository: str
    revision: str
    path: str

    def url(self, endpoint: str) -> str:
        """Where its bytes are."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(
            self.repository,
            self.path,
            repo_type=self.kind,
            revision=self.revision,
            endpoint=endpoint,
        )

    def listing_url(self, endpoint: str) -> str:
        """What the repository has at this revision."""
        revision = quote(self.revision, safe="")
        return f"{endpoint}/api/{self.kind}s/{self.repository}/revision/{revision}"

    def sole(self, listing: bytes, *, name: str) -> "HubFile":
        """The one LoRA of a repository whose list of files is given, at its commit.

        Raises `LoraNotFound`, or `NotSafetensors` where there are other files only.
        """
        try:
            found = msgspec.json.decode(listing, type=_Listing)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise LoraNotFound(f"{name}: what the hub lists cannot be read") from None
        names = [file.rfilename for file in found.siblings if not _climbs(file.rfilename)]
        loras = sorted(file for file in names if file.endswith(".safetensors"))
        if not loras:
            raise NotSafetensors(
                f"{name}: none of the repository's {len(names)} files is a safetensors file"
            )
        if len(loras) > 1:
            shown = ", ".join(file[:100] for file in loras[:_SHOWN])
            raise LoraNotFound(
                f"{name}: the repository has {len(loras)} safetensors files, name one: {shown}"
            )
        commit = found.sha if found.sha and _COMMIT.fullmatch(found.sha) else self.revision
        return self._replace(path=loras[0], revision=commit)


class _Sibling(Struct, frozen=True):
    rfilename: str


class _Listing(Struct, frozen=True):
    siblings: tuple[_Sibling, ...]
    sha: str | None = None


def hub_file(address: str, *, endpoint: str = HUGGING_FACE) -> HubFile:
    """The file that `hf://owner/repo[@rev][/file]`, `hf://owner/repo/file@rev` or a page of the hub means.

    Raises `LoraNotFound` where it means none.
    """
    from huggingface_hub import parse_hf_uri

    name = without_secrets(address)
    if found := _REVISION_LAST.fullmatch(address):
        address = f"hf://{found[1]}@{found[3].replace('/', '%2F')}/{found[2]}"
    try:
        uri = parse_hf_uri(address, endpoint=endpoint)
    except ValueError:  # its text quotes the whole address
        raise LoraNotFound(
            f"{name}: no file of the hub; expected hf://owner/repo/file@revision"
        ) from None
    if not uri.is_repo or _climbs(uri.path_in_repo) or _climbs(uri.revision or ""):
        raise LoraNotFound(f"{name}: no file of a repository")
    return HubFile(uri.type, uri.id, uri.revision or "main", uri.path_in_repo)


def _climbs(path: str) -> bool:
    """Whether a path leads elsewhere than below where it begins."""
    return any(part in (".", "..") for part in path.split("/"))


def civitai_url(address: str, *, site: str = CIVITAI) -> str:
    """The download of `civitai://<version id>`, with its query if it has one; raises `LoraNotFound`."""
    if not (found := _VERSION.fullmatch(address)):
        raise LoraNotFound(f"{without_secrets(address)}: expected civitai://<version id>, a number")
    return f"{site}/api/download/models/{found[1]}{found[2] or ''}"


def reference(url: str, *, hub: str = HUGGING_FACE, civitai: str = CIVITAI) -> str:
    """What a URL of the two sites refers to, as `hf://` or `civitai://`; others with their scheme in lower case.

    Pages that people paste are understood. The sites are base URLs as `config.web_url` spells them. Raises `LoraNotFound`
    for a page of Civitai that names no version, `LoraNotAllowed` for what is no URL.
    """
    scheme, mark, rest = url.partition("://")
    url = f"{scheme.lower()}{mark}{rest}"
    try:
        parts = urlsplit(url)
    except ValueError:
        raise LoraNotAllowed(f"{without_secrets(url)}: no URL that is opened") from None
    origin = f"{parts.scheme}://{parts.netloc}".lower()
    if origin in (civitai, *(_CIVITAIS if civitai == CIVITAI else ())):
        return _civitai_reference(url)
    if origin in (hub, *(_HUBS if hub == HUGGING_FACE else ())):
        try:
            file = hub_file(url, endpoint=hub)
        except LoraNotFound:
            return url
        return f"hf://{file.kind}s/{file.repository}@{quote(file.revision, safe='')}/{file.path}".rstrip(
            "/"
        )
    return url


def _civitai_reference(url: str) -> str:
    parts = urlsplit(url)
    if found := re.fullmatch(r"/api/download/models/([0-9]{1,12})/?", parts.path):
        return f"civitai://{found[1]}{'?' if parts.query else ''}{parts.query}"
    if parts.path.startswith("/models/"):
        if version := parse_qs(parts.query).get("modelVersionId"):
            return f"civitai://{version[0]}"
        raise LoraNotFound(
            f"{without_secrets(url)}: a page of many versions; name one: civitai://<version id>"
        )
    return url
