"""The client's state directory: what must outlive a crash, and the lock that keeps a second process out.

    client.json         who this client is, what it agreed to, what it was started with
    model.safetensors   its newest prompt, private gate and experts
    metrics.jsonl       one line a round
    aggregation.bin     its part in the aggregation of its newest round; holds secrets while that round is open
    split.json          which of its images are for testing
    seen.json           the newest expert that it opened of each author
    matching/           its newest sketch and query, as they were sent
    releases.jsonl      one line for each noised sketch, without --dp-epsilon, from before its noise was drawn
    privacy.json        what differential privacy it promised, where it did
    result.json         how good the final model is
    identity/           key and certificate
    features/           cache of image features: as sensitive as the images
    lock

Every file is replaced as a whole; a process killed at any instant leaves the old one or the new one.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal, Self

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pfed_client.aggregation_file import AggregationFile
from pfed_client.files import write_atomically
from pfed_client.kept_file import KeptFiles
from pfed_client.local_model import LocalModel
from pfed_client.metrics import MetricsLog
from pfed_client.promise import PromiseFile
from pfed_client.release_log import ReleaseLog
from pfed_client.seen import SeenFile
from pfed_client.splitting import SPLIT_FILE, SplitFile
from pfedsecure.clip.feature_cache import DEFAULT_BYTES
from pfedsecure.errors import StateError, StateLocked
from pfedsecure.plan import Plan, first_problem

FORMAT = 1

PROMISE_FILE = "privacy.json"

START_ANEW = (
    "ask its operator why before you start anew with another --state: what two sums over nearly the same clients "
    "differ by can be this client's prompt"
)
"""Advice where the server is not what it was. Only the state knows in which rounds of which federation it took part."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(_Section):
    """What a client was started with and later commands need again. `model`, `pretrained`: None takes the plan's."""

    data: str
    data_root: Path
    """Where relative paths in `data` start."""
    test_fraction: float
    strict: bool
    model: str | None
    pretrained: str | None
    backbone_dir: Path | None
    precision: Literal["fp32", "bf16"]
    share_metrics: bool = False
    """Whether accuracy and loss may join the secure sum of a plan that has them."""
    fetch: Literal["nearest", "all"] = "nearest"
    """Whose experts are fetched: of those that matching found, or of everybody."""
    dp_epsilon: float | None = None
    """Of differential privacy, for the whole federation. None: without."""
    dp_delta: float | None = None
    """None: the default, which depends on the number of images."""
    ledger: Path | None = None
    """Folder of the ledgers of what was released of which images. None: `default_folder` of `pfed_client.ledger`."""
    feature_cache_gib: Annotated[float, Field(gt=0)] = DEFAULT_BYTES / 2**30
    """Most that the cache of image features takes on disk, in GiB."""

    @classmethod
    def of(
        cls,
        data: str,
        data_root: Path = Path(),
        test_fraction: float = 0.5,
        *,
        dp_epsilon: float | None = None,
        dp_delta: float | None = None,
    ) -> Self:
        """Those of a client that was told no more: all else is the plan's, or what the command line has by default."""
        return cls(
            data=data,
            data_root=data_root,
            test_fraction=test_fraction,
            strict=False,
            model=None,
            pretrained=None,
            backbone_dir=None,
            precision="fp32",
            dp_epsilon=dp_epsilon,
            dp_delta=dp_delta,
        )

    @property
    def cache_bytes(self) -> int:
        """Most that the cache of image features takes."""
        return int(self.feature_cache_gib * 2**30)

    def backbone(self, plan: Plan) -> tuple[str, str]:
        """open_clip's name of the frozen model, and its weights (tag or file)."""
        return self.model or plan.backbone.model, self.pretrained or plan.backbone.pretrained


class Record(_Section):
    """The content of client.json."""

    format: int
    name: str
    instance_id: str
    """Random; tells the server a restarted client from a second one with the same certificate."""
    plan: Plan | None = None
    federation_id: str | None = None
    """Pinned when the federation was first joined, with `plan`; both or neither."""
    settings: Settings | None = None
    data_fingerprint: str | None = None
    """`ImageSet.fingerprint` of the images behind `settings.data`; both or neither."""
    left: str | None = None
    """When this client left the federation, ISO 8601 in UTC."""


class ClientState:
    """A locked state directory. Use it in a `with` statement, or call `close`."""

    def __init__(self, folder: Path) -> None:
        """Lock `folder`, made if it is not there (mode 0700).

        Raises StateLocked when another process has it, StateError when it cannot be used.
        """
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = FileLock(folder / "lock", timeout=0)
            self._lock.acquire()
        except Timeout:
            raise StateLocked(
                f"{folder}: another client uses this state directory; stop it or give another --state"
            ) from None
        except OSError as error:
            raise StateError(f"{folder}: cannot be used as state directory ({error.strerror}); give another") from None
        try:
            self._record = read_record(folder)
        except BaseException:
            self.close()
            raise
        self.metrics = MetricsLog(folder / "metrics.jsonl")
        self.aggregation = AggregationFile(folder / "aggregation.bin")
        self.split = SplitFile(folder / SPLIT_FILE)
        self.seen = SeenFile(folder / "seen.json")
        self.kept = KeptFiles(folder / "matching")
        self.releases = ReleaseLog(folder / "releases.jsonl")
        self.promise = PromiseFile(folder / PROMISE_FILE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes use the directory."""
        self._lock.release()

    @property
    def name(self) -> str | None:
        """The client that this state is of; None before `claim`."""
        return self._record.name if self._record else None

    @property
    def record(self) -> Record:
        """What client.json holds; there is one after `claim`."""
        if self._record is None:
            raise ValueError("nobody claimed this state directory yet")
        return self._record

    def claim(self, name: str) -> None:
        """Make this the state of client `name`. Raises StateError when it is another's, or has left its federation."""
        if self._record is None:
            self._save(Record(format=FORMAT, name=name, instance_id=secrets.token_hex(16)))
        elif self._record.name != name:
            raise StateError(
                f"{self.folder}: belongs to client {self._record.name}, not {name}; give {name} another --state"
            )
        elif self._record.left is not None:
            raise StateError(
                f"{self.folder}: {name} left its federation on {self._record.left[:10]}; to take part again give "
                "another --state"
            )

    def pin(self, plan: Plan, federation_id: str) -> None:
        """Remember for ever which plan of which federation was agreed to."""
        self._save(self.record.model_copy(update={"plan": plan, "federation_id": federation_id}))

    def check_data(self, settings: Settings, fingerprint: str) -> None:
        """Raise StateError when this client joined with other images than those of `fingerprint`.

        Before the first `Join` nothing depends on the images yet.
        """
        old = self.record.data_fingerprint
        if self.record.plan is not None and old is not None:
            require_same_data(self.folder, settings, fingerprint, old)

    def remember(self, settings: Settings, data_fingerprint: str) -> None:
        """Keep `settings`, and which images they lead to, for later commands."""
        update = {"settings": settings, "data_fingerprint": data_fingerprint}
        self._save(self.record.model_copy(update=update))

    def leave(self) -> None:
        """Remember for ever that this client left its federation."""
        if self.record.left is None:
            self._save(self.record.model_copy(update={"left": datetime.now(UTC).isoformat(timespec="seconds")}))

    @property
    def has_model(self) -> bool:
        """Whether anything was trained."""
        return _model_file(self.folder).exists()

    def load_model(self, belongs_to: Mapping[str, str]) -> LocalModel | None:
        """The newest model; None before there is one. Raises StateError or CheckpointMismatch."""
        return load_model(self.folder, belongs_to)

    def save_model(self, model: LocalModel, belongs_to: Mapping[str, str]) -> None:
        """Replace the newest model; on return it is on the disk. Raises StateError."""
        path = _model_file(self.folder)
        try:
            model.save(path, belongs_to=dict(belongs_to))
        except OSError as error:
            raise StateError(
                f"{path}: cannot be written ({error.strerror}); free space or mend its permissions"
            ) from None

    def save_result(self, result: dict[str, float | int | str]) -> None:
        """Replace result.json. Raises StateError."""
        write_atomically(self.folder / "result.json", json.dumps(result, indent=2, allow_nan=False).encode() + b"\n")

    def _save(self, record: Record) -> None:
        content = record.model_dump_json(by_alias=True, indent=2)
        write_atomically(_record_file(self.folder), content.encode() + b"\n")
        self._record = record


def read_record(folder: Path) -> Record | None:
    """client.json of a state directory, locked by this process or not; None when there is none. Raises StateError."""
    path = _record_file(folder)
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"{path}: cannot be read ({error.strerror}); mend its permissions") from None
    except (ValueError, RecursionError):
        raise _damaged(path, "not JSON") from None
    if not isinstance(values, dict):
        raise _damaged(path, "not a JSON object")
    version = values.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise StateError(f"{path}: written by a newer version (format {version}, known {FORMAT}); install that version")
    try:
        record = Record.model_validate(values)
    except ValidationError as error:
        raise _damaged(path, first_problem(error)) from None
    if (record.plan is None) != (record.federation_id is None):
        raise _damaged(path, "plan and federation_id belong together")
    if (record.settings is None) != (record.data_fingerprint is None):
        raise _damaged(path, "settings and data_fingerprint belong together")
    return record


def require_same_data(folder: Path, settings: Settings, found: str, joined_with: str) -> None:
    """Raise StateError when fingerprint `found` of the images of `settings` is not the one that `folder` joined with.

    Other images are split otherwise: the accuracy would be of images that were trained on.
    """
    if found != joined_with:
        raise StateError(
            f"{folder}: the images of {settings.data} are not those that this client joined with (fingerprint "
            f"{found[:12]}, then {joined_with[:12]}): it could be tested on images that it trained on; restore the "
            "data, or ask the server's operator, then start anew with another --state"
        )


def load_model(folder: Path, belongs_to: Mapping[str, str]) -> LocalModel | None:
    """The model of a state directory, locked by this process or not; None when there is none.

    Raises StateError when it is damaged, CheckpointMismatch when it is of another plan or backbone.
    """
    path = _model_file(folder)
    return LocalModel.load(path, belongs_to=dict(belongs_to)) if path.exists() else None


def model_owner(plan: Plan, backbone_digest: str) -> dict[str, str]:
    """What a saved model belongs to."""
    return {"plan": plan.digest(), "backbone": backbone_digest}


def _record_file(folder: Path) -> Path:
    return folder / "client.json"


def _model_file(folder: Path) -> Path:
    return folder / "model.safetensors"


def _damaged(path: Path, what: str) -> StateError:
    return StateError(
        f"{path}: damaged ({what}); restore it from a copy, or ask the server's operator, then start anew with another "
        "--state"
    )
