"""The shared-prefix text tower against open_clip's own forward pass over all 77 tokens."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedsecure.clip import prefix_attention, text
from pfedsecure.clip.class_tails import ClassTails
from pfedsecure.clip.text import TextTower
from pfedsecure.errors import BackboneError

NAMES = ("dog", "calculator", "laptop computer", "a rather long name of a class", "zebra_crossing")
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3}
VISION = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}


@pytest.fixture(params=[12, 96], ids=["groups", "one-group"])
def grouped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention takes the classes in groups, or all of them at once."""
    monkeypatch.setattr(prefix_attention, "TOKENS_TOGETHER", request.param)


def small_clip(kind: str = "CLIP", **text: object) -> nn.Module:
    torch.manual_seed(5)
    model = getattr(open_clip, kind)(embed_dim=48, vision_cfg=VISION, text_cfg=TEXT | text, quick_gelu=True)
    # Far from the initial weights, so that every part of the tower matters.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def full_features(model: nn.Module, context: Tensor, names: tuple[str, ...]) -> Tensor:
    """Slow and obvious: every class with its own 77 tokens, through open_clip's own transformer."""
    source = getattr(model, "text", model)
    tokenizer = open_clip.SimpleTokenizer()
    placeholder = " ".join(["x"] * len(context))
    tokens = tokenizer([f"{placeholder} {name.replace('_', ' ')}." for name in names])
    x = source.token_embedding(tokens)
    x = torch.cat([x[:, :1], context.expand(len(names), *context.shape), x[:, 1 + len(context) :]], dim=1)
    x = source.ln_final(source.transformer(x + source.positional_embedding, attn_mask=source.attn_mask))
    x = x[torch.arange(len(names)), tokens.argmax(dim=1)]
    projection = source.text_projection
    return F.normalize(projection(x) if isinstance(projection, nn.Linear) else x @ projection, dim=-1)


@pytest.mark.parametrize("tokens_together", [1, 12, 96])
@pytest.mark.parametrize("n_context", [1, 4, 16])
@pytest.mark.parametrize(
    ("kind", "settings"), [("CLIP", {}), ("CustomTextCLIP", {}), ("CLIP", {"proj_bias": True, "ls_init_value": 0.3})]
)
def test_equals_uncut_tower_with_gradients(
    monkeypatch: pytest.MonkeyPatch, tokens_together: int, n_context: int, kind: str, settings: dict[str, object]
) -> None:
    """Whether attention takes each class by itself, some or all of them at once."""
    monkeypatch.setattr(prefix_attention, "TOKENS_TOGETHER", tokens_together)
    model = small_clip(kind, **settings).double()  # so that a real difference cannot hide in rounding
    tower = TextTower(model)
    classes = tower.class_tails(open_clip.SimpleTokenizer(), NAMES, n_context)
    generator = torch.Generator().manual_seed(n_context)
    context = 0.1 * torch.randn(n_context, 64, generator=generator, dtype=torch.float64)
    weights = torch.randn(len(NAMES), 48, generator=generator, dtype=torch.float64)

    ours, theirs = context.clone().requires_grad_(), context.clone().requires_grad_()
    got = tower(ours[None], classes)[0]
    want = full_features(model, theirs, NAMES)
    (got * weights).sum().backward()
    (want * weights).sum().backward()

    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert theirs.grad.abs().max() > 1e-2
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=1e-9)


@pytest.mark.usefixtures("grouped")
def test_equals_uncut_tower_in_float32() -> None:
    model = small_clip()
    tower = TextTower(model)
    context = 0.1 * torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    got = tower(context[None], tower.class_tails(open_clip.SimpleTokenizer(), NAMES, 16))[0]
    torch.testing.assert_close(got, full_features(model, context, NAMES), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("grouped")
def test_prompts_in_one_batch_equal_prompts_one_by_one() -> None:
    tower = TextTower(small_clip())
    classes = tower.class_tails(open_clip.SimpleTokenizer(), NAMES, 4)
    contexts = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0))
    together = tower(contexts, classes)
    assert together.shape == (3, len(NAMES), 48)
    for one, context in zip(together, contexts, strict=True):
        torch.testing.assert_close(one, tower(context[None], classes)[0], atol=1e-6, rtol=0)


def test_features_do_not_depend_on_the_other_classes() -> None:
    tower = TextTower(small_clip())
    tokenizer = open_clip.SimpleTokenizer()
    context = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    together = tower(context, tower.class_tails(tokenizer, NAMES, 4))[0]
    for name, feature in zip(NAMES, together, strict=True):
        alone = tower(context, tower.class_tails(tokenizer, [name], 4))[0, 0]
        torch.testing.assert_close(feature, alone, atol=1e-6, rtol=0)


def test_sequences_end_with_their_names() -> None:
    tower = TextTower(small_clip())
    classes = tower.class_tails(open_clip.SimpleTokenizer(), ("cat", "dog house"), 4)
    assert classes.lengths == (3, 4)  # one word or two, full stop, EOT
    assert classes.tokens.shape == (7, 64)


@pytest.mark.usefixtures("grouped")
def test_many_gradients_at_once_are_those_one_by_one() -> None:
    tower = TextTower(small_clip().double())
    classes = tower.class_tails(open_clip.SimpleTokenizer(), NAMES, 4)
    generator = torch.Generator().manual_seed(3)
    contexts = torch.randn(2, 4, 64, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(3, 2, len(NAMES), 48, generator=generator, dtype=torch.float64)
    features = tower(contexts, classes)
    (together,) = torch.autograd.grad(features, contexts, weights, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(features, contexts, each, retain_graph=True)[0] for each in weights]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-12, rtol=1e-9)


@pytest.mark.usefixtures("grouped")
def test_no_prompt_has_no_features() -> None:
    tower = TextTower(small_clip())
    classes = tower.class_tails(open_clip.SimpleTokenizer(), NAMES, 4)
    assert tower(torch.zeros(0, 4, 64), classes).shape == (0, len(NAMES), 48)


def gradients(tower: TextTower, classes: ClassTails) -> tuple[Tensor, Tensor]:
    """Features of two prompts, and the gradients of three sums of them by the contexts, taken in one backward pass."""
    generator = torch.Generator().manual_seed(3)
    contexts = torch.randn(2, 4, 64, generator=generator).requires_grad_()
    weights = torch.randn(3, 2, len(classes.lengths), 48, generator=generator)
    features = tower(contexts, classes)
    (found,) = torch.autograd.grad(features, contexts, weights, is_grads_batched=True)
    return features.detach(), found


@pytest.mark.parametrize("tokens_at_once", [1, 17, 40])
def test_classes_taken_some_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch, tokens_at_once: int) -> None:
    tower = TextTower(small_clip())
    classes = tower.class_tails(open_clip.SimpleTokenizer(), NAMES, 4)
    together = gradients(tower, classes)
    monkeypatch.setattr(text, "_TOKENS_AT_ONCE", tokens_at_once)
    seen = record_rows(monkeypatch)
    apart = gradients(tower, classes)
    assert len(seen) > 1
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-5)


def record_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of classes of all passes through a tower from now on."""
    seen: list[int] = []
    inner = TextTower._features

    def features(self: TextTower, contexts: Tensor, classes: ClassTails) -> Tensor:
        seen.append(len(classes.lengths))
        return inner(self, contexts, classes)

    monkeypatch.setattr(TextTower, "_features", features)
    return seen


@pytest.mark.parametrize(
    ("n_context", "names"),
    [(4, NAMES), (16, ("dog",) * 32), (16, ("dog",) * 40), (64, ("dog",) * 64), (4, (*["dog"] * 40, "word " * 50))],
)
def test_what_a_backward_pass_keeps_is_not_more_than_is_reckoned_with(
    monkeypatch: pytest.MonkeyPatch, n_context: int, names: tuple[str, ...]
) -> None:
    """In one group of attention, in full ones, in one that a single long name fills: else memory would end early."""
    tower = TextTower(small_clip(width=128, heads=2, layers=1))  # as wide as the heads of CLIP
    blocks = nn.ModuleList([*tower.blocks] * 8)
    tower.blocks, kept = blocks, {}
    classes = tower.class_tails(open_clip.SimpleTokenizer(), names, n_context)
    parameters = {parameter.data_ptr() for parameter in tower.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = tower(torch.zeros(1, n_context, 128, requires_grad=True), classes)
    room = tower._room(1 + n_context)
    reckoned = (1 + n_context + len(classes.tokens)) * text._MEMORY_ON_CPU / room
    assert 0.4 < sum(kept.values()) / reckoned < 1
    assert features.requires_grad


@pytest.mark.parametrize(("room", "again"), [(1000, 0), (80, 2), (41, 5)])
def test_what_is_computed_again_is_the_same_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, room: int, again: int
) -> None:
    """As many classes as do not fit into memory, which has room for so many tokens."""
    tower = TextTower(small_clip())
    classes = tower.class_tails(open_clip.SimpleTokenizer(), NAMES, 4)
    monkeypatch.setattr(text, "_TOKENS_AT_ONCE", 28)  # parts of 2, 1, 1 and 1 classes with 22, 20, 28 and 18 tokens
    kept = gradients(tower, classes)
    monkeypatch.setattr(TextTower, "_room", lambda _self, _n_prefix: room)
    seen = record_rows(monkeypatch)
    found = gradients(tower, classes)
    assert sum(seen) == len(NAMES) + again  # forwards, and once more before going back
    assert all(torch.equal(*pair) for pair in zip(kept, found, strict=True))
    seen.clear()
    with torch.no_grad():
        tower(torch.zeros(2, 4, 64), classes)
    assert sum(seen) == len(NAMES)  # nothing to go back for


def test_fewer_classes_are_taken_at_a_time_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing everything again at once would need as much memory as keeping it."""
    tower = TextTower(small_clip())
    classes = tower.class_tails(open_clip.SimpleTokenizer(), NAMES, 4)
    kept = gradients(tower, classes)
    seen = record_rows(monkeypatch)
    for room, expected in ((0, [1, 1, 1, 1, 1]), (32, [3, 1, 1]), (10_000, [5])):
        monkeypatch.setattr(TextTower, "_room", lambda _self, _n_prefix, room=room: room)
        seen.clear()
        torch.testing.assert_close(gradients(tower, classes), kept, atol=1e-5, rtol=1e-5)
        assert seen[: len(expected)] == expected


@pytest.mark.usefixtures("grouped")
def test_under_vmap_it_is_the_same_as_one_by_one() -> None:
    tower = TextTower(small_clip())
    classes = tower.class_tails(open_clip.SimpleTokenizer(), NAMES, 4)
    contexts = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0))

    def loss(context: Tensor) -> Tensor:
        return tower(context[None], classes)[0, :, 0].sum()

    together = torch.func.vmap(torch.func.grad(loss))(contexts)
    one_by_one = torch.stack([torch.func.grad(loss)(context) for context in contexts])
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-5)


def test_nothing_of_the_tower_is_trained() -> None:
    tower = TextTower(small_clip())
    context = torch.randn(1, 4, 64, requires_grad=True)
    tower(context, tower.class_tails(open_clip.SimpleTokenizer(), NAMES, 4)).sum().backward()
    assert context.grad is not None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in tower.parameters())


def test_name_that_does_not_fit() -> None:
    tower = TextTower(small_clip())
    with pytest.raises(BackboneError, match=r"has 73 tokens; with 4 of context that is over the model's 77"):
        tower.class_tails(open_clip.SimpleTokenizer(), ["word " * 71], 4)


@pytest.mark.parametrize("settings", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}])
def test_refuses_towers_that_prompts_do_not_work_with(settings: dict[str, object]) -> None:
    with pytest.raises(BackboneError, match="not a causal CLIP transformer"):
        TextTower(small_clip("CustomTextCLIP", **settings))
