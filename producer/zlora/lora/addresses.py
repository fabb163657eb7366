"""Addresses of LoRAs: their schemes, their canonical spelling, and the URLs that they stand for."""

import re
from typing import Final, NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

import msgspec
from msgspec import Struct

from zlora.errors import LoraNotAllowed, LoraNotFound, NotSafetensors
from zlora.redaction import without_secrets

# Schemes that preflight opens, and schemes that need the settings or the files of a worker.
PUBLIC_SCHEMES: Final = ("https", "http", "hf", "civitai")
WORKER_SCHEMES: Final = ("s3", "cozy", "file", "demo")
CATALOGUE: Final = "lora"  # scheme of names in a worker's catalogue, which replaces them

HUGGING_FACE: Final = "https://huggingface.co"
CIVITAI: Final = "https://civitai.com"
PUBLIC_SITES: Final = frozenset(
    {HUGGING_FACE, CIVITAI}
)  # other sites of an operator may be private
_HUGGING_FACE_ALIASES: Final = ("https://hf.co",)
_CIVITAI_ALIASES: Final = ("https://www.civitai.com",)
MAX_LISTING: Final = 8 * 2**20  # bytes of a repository's list of files
_REVISION_LAST: Final = re.compile(
    r"hf://((?:(?:model|dataset|space)s/)?+[^/@]+/[^/@]+)/(.+)@([^@]+)"
)
_VERSION: Final = re.compile(r"civitai://([0-9]{1,12})(\?.*)?")
_DOWNLOAD_PATH: Final = re.compile(r"/api/download/models/([0-9]{1,12})/?")
_COMMIT: Final = re.compile("[0-9a-f]{40,64}")
_SHOWN: Final = 5  # file names in a message


def scheme_of(address: str) -> str:
    """Return the scheme of an address in lower case; empty if there is none."""
    scheme, mark, _ = address.partition("://")
    return scheme.lower() if mark else ""


class HubFile(NamedTuple):
    """A file of a repository on Hugging Face; an empty path stands for its only LoRA."""

    kind: str
    repository: str
    revision: str
    path: str

    def url(self, endpoint: str) -> str:
        """Return the URL of the file's bytes."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(
            self.repository,
            self.path,
            repo_type=self.kind,
            revision=self.revision,
            endpoint=endpoint,
        )

    def listing_url(self, endpoint: str) -> str:
        """Return the URL of the list of the repository's files at this revision."""
        revision = quote(self.revision, safe="")
        return f"{endpoint}/api/{self.kind}s/{self.repository}/revision/{revision}"

    @property
    def address(self) -> str:
        """Canonical `hf://` address."""
        revision = quote(self.revision, safe="")
        return f"hf://{self.kind}s/{self.repository}@{revision}/{self.path}".rstrip("/")

    def beside(self, name: str) -> "HubFile":
        """Return the file of another name in the same folder."""
        folder, slash, _ = self.path.rpartition("/")
        return self._replace(path=f"{folder}{slash}{name}")

    def only_lora(self, listing: bytes, *, name: str) -> "HubFile":
        """Return the only safetensors file of a listed repository, at the commit of the list.

        Raises `LoraNotFound` if there are several or the list cannot be read, `NotSafetensors` if
        there are other files only.
        """
        try:
            found = msgspec.json.decode(listing, type=_Listing)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise LoraNotFound(f"{name}: the hub's list of files cannot be read") from None
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
    """Return the file of `hf://owner/repo[@rev][/file]`, `hf://owner/repo/file@rev` or a page.

    Raises `LoraNotFound` if the address names no file of the hub.
    """
    from huggingface_hub import parse_hf_uri

    name = without_secrets(address)
    if found := _REVISION_LAST.fullmatch(address):
        address = f"hf://{found[1]}@{found[3].replace('/', '%2F')}/{found[2]}"
    try:
        uri = parse_hf_uri(address, endpoint=endpoint)
    except ValueError:  # its text quotes the whole address
        raise LoraNotFound(
            f"{name}: not a file of the hub; expected hf://owner/repo/file@revision"
        ) from None
    if not uri.is_repo or _climbs(uri.path_in_repo) or _climbs(uri.revision or ""):
        raise LoraNotFound(f"{name}: not a file of a repository")
    return HubFile(uri.type, uri.id, uri.revision or "main", uri.path_in_repo)


def _climbs(path: str) -> bool:
    """Return whether a path may lead out of its folder."""
    return any(part in (".", "..") for part in path.split("/"))


def civitai_url(address: str, *, site: str = CIVITAI) -> str:
    """Return the download URL of `civitai://<version id>[?query]`; raise `LoraNotFound`."""
    if not (found := _VERSION.fullmatch(address)):
        raise LoraNotFound(f"{without_secrets(address)}: expected civitai://<version id>, a number")
    return f"{site}/api/download/models/{found[1]}{found[2] or ''}"


def canonical(url: str, *, hub: str = HUGGING_FACE, civitai: str = CIVITAI) -> str:
    """Return a URL of the two sites as `hf://` or `civitai://`, others with a lower-case scheme.

    Understands the URLs of pages and of downloads. `hub` and `civitai` are base URLs as
    `config.web_url` returns them. Raises `LoraNotFound` for a page of Civitai that names no
    version, `LoraNotAllowed` if `url` is not a URL.
    """
    scheme, mark, rest = url.partition("://")
    url = f"{scheme.lower()}{mark}{rest}"
    try:
        parts = urlsplit(url)
    except ValueError:
        raise LoraNotAllowed(f"{without_secrets(url)}: not a URL that is opened") from None
    origin = f"{parts.scheme}://{parts.netloc}".lower()
    if origin == civitai or (civitai == CIVITAI and origin in _CIVITAI_ALIASES):
        return _canonical_civitai(url)
    if origin == hub or (hub == HUGGING_FACE and origin in _HUGGING_FACE_ALIASES):
        try:
            return hub_file(url, endpoint=hub).address
        except LoraNotFound:
            return url
    return url


def _canonical_civitai(url: str) -> str:
    parts = urlsplit(url)
    if found := _DOWNLOAD_PATH.fullmatch(parts.path):
        query = f"?{parts.query}" if parts.query else ""
        return f"civitai://{found[1]}{query}"
    if parts.path.startswith("/models/"):
        if version := parse_qs(parts.query).get("modelVersionId"):
            return f"civitai://{version[0]}"
        raise LoraNotFound(
            f"{without_secrets(url)}: a page of many versions; name one: civitai://<version id>"
        )
    return url
