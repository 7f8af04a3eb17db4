"""What the engine reads of a repository, brought into the Hugging Face cache by huggingface_hub."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tinydrug.errors import BadModelFile, DownloadError, ModelNotFound, TinydrugError, UnsupportedModel
from tinydrug.hub import cache
from tinydrug.hub.cache import INDEX, SINGLE, TOKENIZERS, Snapshot

logger = logging.getLogger("tinydrug")

# Everything but the weights: a fixed list, so that no code and no pickle of a repository is ever asked for.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def download(repo: str, revision: str = "main", *, bars: bool = False) -> Snapshot:
    """Fetch what the engine reads of `repo` and return it, whole and pinned to a commit.

    HF_ENDPOINT, HF_TOKEN and the variables of the cache are honoured. Files arrive one by one in this thread,
    so that Ctrl-C ends it at once; whole files are kept and the next call goes on from there. The revision's
    name is written last: until then no one who asks the cache for it finds half a model.

    Raises ModelNotFound (no such repository or revision), UnsupportedModel (not a checkpoint in safetensors),
    BadModelFile (an index that is wrong), DownloadError (anything else).
    """
    try:
        with _bars(bars):
            commit = _download(repo, revision)
    except TinydrugError:
        raise
    except Exception as error:  # the library's own, those of its HTTP library (httpx or requests), the disk's
        raise _explained(error, repo, revision) from error
    snapshot = cache.find_snapshot(repo, commit)
    if snapshot is None or snapshot.missing:
        raise DownloadError(f"{_hub()} did not deliver all of {repo}@{commit}: run it again")
    _name(repo, revision, commit)
    return snapshot


def _download(repo: str, revision: str) -> str:
    """Bring the files and return the commit they are of."""
    from huggingface_hub import HfApi, hf_hub_download

    endpoint = os.environ.get("HF_ENDPOINT") or None
    info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    logger.info("downloading %s@%s into %s", repo, info.sha, cache.hub_cache())

    def bring(file: str) -> Path:
        where = {"revision": info.sha, "cache_dir": cache.hub_cache(), "endpoint": endpoint}
        return Path(hf_hub_download(repo, file, **where))

    _check_kind(repo, set(sizes))
    for file in SMALL_FILES:
        if file in sizes:
            bring(file)
    weights = sorted(cache.shards(bring(INDEX))) if INDEX in sizes else [SINGLE]
    if absent := [file for file in weights if file not in sizes]:
        raise BadModelFile(f"{repo}/{INDEX}", f"the repository has no {', '.join(absent)}: choose another")
    _check_room(repo, info.sha, {file: sizes[file] for file in weights})
    for file in weights:
        bring(file)
    return info.sha


@contextlib.contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    """The library draws bars on a stderr that is a terminal, unless it is told not to."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not wanted and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _check_kind(repo: str, files: set[str]) -> None:
    """Refuse what could not be run anyway before gigabytes of it arrive."""
    if not files & {INDEX, SINGLE}:
        others = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".gguf")))
        has = f", only {', '.join(others[:3])}" if others else ""
        raise UnsupportedModel(f"{repo} has no safetensors{has}: choose a repository that has {SINGLE}")
    for needed in ({"config.json"}, set(TOKENIZERS)):
        if not files & needed:
            raise UnsupportedModel(f"{repo} has no {' or '.join(sorted(needed))}: it is not a whole model")


def _check_room(repo: str, commit: str, sizes: dict[str, int]) -> None:
    """Refuse before it starts a download that would fill the disk; `sizes` in bytes."""
    here = cache.listing(cache.repo_folder(repo) / "snapshots" / commit)
    need = sum(size for file, size in sizes.items() if file not in here)
    free = shutil.disk_usage(cache.hub_cache()).free
    if need > free:
        raise _disk_full(f"{repo} needs {need:,} bytes more and {free:,} are free")


def _disk_full(reason: str) -> DownloadError:
    folder = cache.hub_cache()
    return DownloadError(f"no room in {folder}: {reason}; make room or set HF_HUB_CACHE to another folder")


def _name(repo: str, revision: str, commit: str) -> None:
    """Let `revision` mean `commit` in the cache; the library does so before the files are there."""
    if revision == commit:
        return
    ref = cache.repo_folder(repo) / "refs" / revision
    partial = ref.with_name(f"{ref.name}.{os.getpid()}")
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(commit, "ascii")
        partial.replace(ref)
    except OSError as error:
        raise _explained(error, repo, revision) from error


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT") or "the Hugging Face hub"


def _explained(error: Exception, repo: str, revision: str) -> TinydrugError:
    """One of our errors for one of the library's, in one line that says what to do."""
    from huggingface_hub import errors

    # What went wrong may lie below "nor is it in the cache" and the layers of an HTTP library.
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(deeper)

    def is_a(kind: type) -> bool:
        return any(isinstance(link, kind) for link in chain)

    if is_a(errors.GatedRepoError):
        return DownloadError(f"{repo} is gated: accept its licence on its page at {_hub()} and set HF_TOKEN")
    if is_a(errors.RevisionNotFoundError):
        return ModelNotFound(f"{_hub()}, which has no revision {revision} of {repo}", repo)
    if is_a(errors.RepositoryNotFoundError):
        return ModelNotFound(f"{_hub()}, which has no {repo}, or keeps it private (set HF_TOKEN)", repo)
    responses = [link.response for link in chain if getattr(link, "response", None) is not None]
    if responses:
        status = responses[0].status_code
        if status in (401, 403):
            return DownloadError(f"{_hub()} refuses {repo} ({status}): check HF_TOKEN")
        return DownloadError(f"{_hub()} answered {status} for {repo}: try again later")
    full = any(getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for link in chain)
    if full or "No space left" in str(error):  # the latter from its downloader in Rust
        return _disk_full(f"the download of {repo} stopped")
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        folder = cache.hub_cache()
        return DownloadError(f"cannot write to {folder}: {_line(error)}; set HF_HUB_CACHE to another folder")
    reason = _line(chain[-1])
    return DownloadError(f"cannot get {repo} from {_hub()}: {reason}; check the network and run it again")


def _line(error: BaseException) -> str:
    """The first line of an error, or its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
