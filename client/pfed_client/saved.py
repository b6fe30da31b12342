"""A client as its state directory remembers it, for commands that need no server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pfed_client.ledger.account import Account, Statement
from pfed_client.ledger.place import default_folder
from pfed_client.local_model import LocalModel
from pfed_client.promise import Promise, PromiseFile
from pfed_client.splitting import SPLIT_FILE, Split, SplitFile, split
from pfed_client.state import PROMISE_FILE, Settings, load_model, model_owner, read_record, require_same_data
from pfedsecure.data import ImageSet, open_images
from pfedsecure.errors import StateError
from pfedsecure.plan import Plan

DEFAULT_STATES = Path("state/clients")
"""Where the state directories of clients are, by name, when --state is not given."""


@dataclass(frozen=True)
class SavedClient:
    """A client that joined a federation."""

    folder: Path
    name: str
    plan: Plan
    federation_id: str
    settings: Settings
    data_fingerprint: str
    """Of the images that it joined with."""

    @classmethod
    def open(cls, folder: Path | None) -> SavedClient:
        """The client of a state directory, by default the only one in `DEFAULT_STATES`. Raises StateError."""
        if folder is None:
            folder = _only_state()
        record = read_record(folder)
        if record is None or record.plan is None or record.settings is None or record.data_fingerprint is None:
            raise StateError(f"{folder}: holds no client that joined a federation; give the --state of one that did")
        assert record.federation_id is not None  # it comes with the plan
        return cls(folder, record.name, record.plan, record.federation_id, record.settings, record.data_fingerprint)

    def split(self) -> tuple[ImageSet, Split]:
        """Its images, labelled as in the plan, and which of them it trained on and which are for testing.

        Raises DataError, ClassNamesMismatch, StateError, also when the images have changed since.
        """
        images, digests = self._images_and_digests()
        labelled = images.relabel(self.plan.class_names)
        known = SplitFile(self.folder / SPLIT_FILE).find(digests)
        return labelled, known or split(labelled, self.plan, self.name, self.settings.test_fraction)

    def promise(self) -> Promise:
        """Its differential privacy. Raises StateError where it promised none, or when that is damaged."""
        made = PromiseFile(self.folder / PROMISE_FILE).read()
        if made is None:
            if self.settings.dp_epsilon is not None:
                raise StateError(f"{self.folder}: {PROMISE_FILE}, what this client promised, is gone; restore it")
            raise StateError(f"{self.folder}: this client takes part without --dp-epsilon, so it has no budget")
        return made

    def ledgers(self, folder: Path | None) -> Statement:
        """What was released of its images, by the ledgers in `folder` or in the one it was started with.

        Raises DataError, StateError when the images have changed, LedgerError.
        """
        _images, digests = self._images_and_digests()
        account = Account(
            folder or self.settings.ledger or default_folder(), digests, federation=self.federation_id, client=self.name
        )
        return account.expect(self.promise().row)

    def model(self, backbone_digest: str) -> LocalModel:
        """Its newest model. Raises StateError when there is none or it is damaged, CheckpointMismatch."""
        model = load_model(self.folder, model_owner(self.plan, backbone_digest))
        if model is None:
            raise StateError(f"{self.folder}: holds no model yet; let the client take part in a round first")
        return model

    def _images_and_digests(self) -> tuple[ImageSet, list[bytes]]:
        """With the SHA-256 of each, which takes reading all of them."""
        images = open_images(self.settings.data, strict=self.settings.strict, root=self.settings.data_root)
        digests = images.content_digests()
        require_same_data(self.folder, self.settings, images.fingerprint(digests), self.data_fingerprint)
        return images, digests


def _only_state() -> Path:
    folders = sorted(file.parent for file in DEFAULT_STATES.glob("*/client.json"))
    if not folders:
        raise StateError(f"there is no client in {DEFAULT_STATES}; join a federation first, or give --state DIR")
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise StateError(f"there are several clients in {DEFAULT_STATES} ({names}); give --state DIR")
    return folders[0]
