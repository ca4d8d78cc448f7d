"""Ways of fine-tuning that keep pretrained knowledge, one by one and combined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from crysdistill.encoders import ENCODERS, make_encoder
from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.training import finetune as finetuning
from crysdistill.training import supervised
from crysdistill.training.anchor import Anchor
from crysdistill.training.augmentation import augmentation
from crysdistill.training.finetune import FinetunePlan, finetune
from crysdistill.training.interpolation import SHARES, between, choose_between
from crysdistill.training.optimizers import layer_rates, make_optimizer
from crysdistill.training.settings import (
    AugmentSettings,
    FreezeSettings,
    HeadSettings,
    OptimizerSettings,
    TrainerSettings,
)
from crysdistill.training.thawing import thaw
from crysdistill.training.train import train
from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.ridge import PENALTIES, fit_last_layer
from crysdistill.transfer.targets import Normalizer, Target
from tests.test_resume import press_ctrl_c, stopped
from tests.together import together
from tests.toy_runs import (
    PLAIN,
    SHORT,
    Watched,
    history,
    results,
    same,
    tuning,
    weights_of,
)
from tests.toy_stores import SMALL_ENCODER, SMALL_GRAPH

RIDGE = HeadSettings(hidden=8, start="ridge")

# ----------------------------------------------------------------- the head's start


def outputs_of(labels: np.ndarray, *targets: Target) -> Outputs:
    normalizers = [Normalizer.fit(t, labels[:, k]) for k, t in enumerate(targets)]
    return Outputs(targets, normalizers)


def leave_one_out(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """Return each crystal's squared error under a fit without that crystal."""
    errors = []
    for i in range(len(x)):
        kept = np.arange(len(x)) != i
        middle, offset = x[kept].mean(0), y[kept].mean()
        a = (x[kept] - middle).T @ (x[kept] - middle) + penalty * np.eye(x.shape[1])
        w = np.linalg.solve(a, (x[kept] - middle).T @ (y[kept] - offset))
        errors.append((y[i] - offset - (x[i] - middle) @ w) ** 2)
    return np.array(errors)


def test_ridge_is_the_plain_solution_with_the_largest_good_penalty():
    torch.manual_seed(0)
    x = torch.randn(30, 5) * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0]) + 3
    y = x[:, 0] - 20 * x[:, 2] + 0.3 * torch.randn(30)
    labels = y[:, None].double().numpy()
    labels[::7] = np.nan
    head = PropertyHead(5, layers=0, first=False)
    outputs = outputs_of(labels, Target("y"))
    fit_last_layer(head, outputs, x, torch.from_numpy(labels))

    known = ~np.isnan(labels[:, 0])
    features = x.double().numpy()
    z = ((features - features.mean(0)) / np.sqrt(features.var(0).mean()))[known]
    wanted = outputs.normalizers[0].normalize(torch.from_numpy(labels[known, 0]))
    wanted = wanted.numpy()
    errors = [leave_one_out(z, wanted, penalty) for penalty in PENALTIES]
    least = min(errors, key=np.mean)
    limit = least.mean() + least.std() / len(least) ** 0.5
    best = [p for p, e in zip(PENALTIES, errors, strict=True) if e.mean() <= limit][-1]
    centred = z - z.mean(0)
    w = np.linalg.solve(centred.T @ centred + best * np.eye(5), centred.T @ wanted)
    expected = centred @ w + wanted.mean()
    found = head(x)[known, 0].detach().numpy()
    assert np.allclose(found, expected, atol=1e-4)


def test_each_target_is_fitted_to_its_own_labels_in_its_own_scale():
    torch.manual_seed(1)
    x = torch.randn(60, 4)
    labels = torch.stack(
        (
            10 ** (1 + x[:, 0]),
            (x[:, 1] > 0).double(),
            (x[:, 2] > -0.5).double() + (x[:, 2] > 0.5),
        ),
        dim=1,
    ).double()
    labels[:20, 0] = torch.nan
    labels[40:, 1] = torch.nan
    targets = (
        Target("modulus", transform="log10"),
        Target("metal", task="classification"),
        Target("kind", task="classification"),
    )
    outputs = outputs_of(labels.numpy(), *targets)
    head = PropertyHead(4, layers=0, outputs=outputs.size, first=False)
    fit_last_layer(head, outputs, x, labels)
    found = outputs.predictions(head(x)).detach().double()
    truth = torch.stack((10 ** (1 + x[:, 0]), (x[:, 1] > 0), labels[:, 2]), dim=1)
    assert torch.allclose(found[:, 0].log10(), truth[:, 0].log10().double(), atol=0.02)
    assert ((found[:, 1] > 0.5) == truth[:, 1].bool()).float().mean() > 0.9
    assert (found[:, 2] == truth[:, 2]).float().mean() > 0.9


def test_a_class_of_one_crystal():
    labels = np.array([[0.0]] * 9 + [[1.0]])
    outputs = outputs_of(labels, Target("class", task="classification"))
    head = PropertyHead(3, layers=0, outputs=2)
    x = torch.cat((torch.zeros(9, 3), torch.ones(1, 3)))
    fit_last_layer(head, outputs, x, torch.from_numpy(labels))
    found = outputs.predictions(head(x))[:, 0]
    assert found[9] > found[:9].max()


def test_a_constant_feature_has_no_weight():
    x = torch.cat((torch.full((20, 1), 1e4), torch.arange(20.0)[:, None]), dim=1)
    labels = x[:, 1:].double()
    outputs = outputs_of(labels.numpy(), Target("y"))
    head = PropertyHead(2, layers=0, first=False)
    fit_last_layer(head, outputs, x, labels)
    assert head.last.weight[0, 0].abs() < 1e-9
    assert torch.allclose(outputs.predictions(head(x)), x[:, 1:], atol=0.01)


def test_features_are_what_the_last_layer_sees():
    head = PropertyHead(4, 6, layers=2, outputs=3)
    x = torch.randn(5, 4)
    assert torch.equal(head(x), head.last(head.features(x)))


@pytest.mark.parametrize("verb", ["train", "finetune"])
def test_a_fitted_head_is_better_from_the_first_step(config, pretrained, verb):
    """Training from scratch has the same option, so that arms stay comparable."""
    errors = {}
    for start in ("ridge", "random"):
        changed = replace(
            config,
            out=config.out.with_name(start),
            head=HeadSettings(hidden=8, start=start),
            optimizer=OptimizerSettings(lr=1e-6),
        )
        if verb == "train":
            train(changed)
        else:
            finetune(tuning(changed, pretrained))
        errors[start] = history(changed.out, "train_loss")[0]
    assert errors["ridge"] < 0.95 * errors["random"]


# ------------------------------------------------------------------ rates by layer


@pytest.mark.parametrize("name", ENCODERS)
def test_every_weight_has_one_rate_and_lower_blocks_a_lower_one(name):
    encoder = make_encoder(name, **ENCODERS[name].SMALL)
    groups = layer_rates(encoder, 0.1, 0.5)
    listed = [id(p) for parameters, _ in groups for p in parameters]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in encoder.parameters()}
    rate = {id(p): lr for parameters, lr in groups for p in parameters}
    blocks = encoder.blocks()
    for depth, block in enumerate([blocks.embedding, *blocks.convolutions]):
        above = len(blocks.convolutions) - depth
        assert {rate[id(p)] for p in block.parameters()} <= {0.1 * 0.5**above}
    if blocks.pooling is not None:
        assert {rate[id(p)] for p in blocks.pooling.parameters()} <= {0.1}
    assert len(layer_rates(encoder, 0.1, 1.0)) == 1


def test_the_optimizer_takes_rates_leaves_out_what_is_frozen_and_what_decays_not():
    encoder = make_encoder("cgcnn", **ENCODERS["cgcnn"].SMALL)
    encoder.embedding.requires_grad_(False)
    groups = layer_rates(encoder, 0.1, 0.5)
    free = list(encoder.convolutions[-1].parameters())
    made = make_optimizer(
        groups, OptimizerSettings(schedule="constant"), 10, 5, undecayed=free
    )
    found = made["optimizer"].param_groups
    assert all(p.requires_grad for group in found for p in group["params"])
    assert {(g["lr"], g["weight_decay"]) for g in found} == {
        (0.05, 1e-4), (0.1, 0.0)
    }  # fmt: skip


def test_lower_blocks_move_less(config, pretrained):
    def steps(out: str, **more) -> list[float]:
        weights = finetune(
            tuning(replace(config, out=config.out.with_name(out)), pretrained, **more)
        )
        before, after = weights_of(pretrained), weights_of(weights)
        names = tuple(
            next(n for n in before if n.startswith(f"encoder.{p}") and "weight" in n)
            for p in ("embedding", "convolutions.1")
        )
        return [float((after[n] - before[n]).abs().max()) for n in names]

    plain, decayed = steps("plain"), steps("decayed", layer_decay=0.1)
    assert decayed[0] < 0.1 * plain[0]
    assert decayed[1] > 0.3 * plain[1]


# ------------------------------------------------------------------------ the anchor


def test_the_penalty_is_half_the_square_of_the_distance():
    block = nn.Linear(2, 1)
    anchor = Anchor([block], 0.5)
    assert anchor().item() == 0
    with torch.no_grad():
        block.weight += torch.tensor([[3.0, -4.0]])
    loss = anchor()
    assert loss.item() == pytest.approx(0.25 * 25, rel=1e-5)
    loss.backward()
    assert torch.allclose(block.weight.grad, 0.5 * torch.tensor([[3.0, -4.0]]))
    assert not list(anchor.parameters())
    assert not anchor.state_dict()


def test_an_anchor_holds_what_was_pretrained(config, pretrained):
    def distance(out: str, **more) -> float:
        changed = replace(config, out=config.out.with_name(out), optimizer=PLAIN)
        before = weights_of(pretrained)
        after = weights_of(finetune(tuning(changed, pretrained, **more)))
        parts = [n for n in before if before[n].is_floating_point()]
        parts = [n for n in parts if "running" not in n]
        return float(sum((after[n] - before[n]).square().sum() for n in parts))

    assert distance("held", l2_sp=40.0) < 0.5 * distance("free")
    assert all(
        value > 0 for value in history(config.out.with_name("held"), "train_l2_sp")
    )


def test_what_starts_anew_has_no_anchor(config, pretrained, dataset):
    plan = FinetunePlan(tuning(config, pretrained, keep=0, l2_sp=1.0))
    learning = plan.prepare(plan.open(), config.trainer)
    module = learning.module
    assert isinstance(module, supervised.SupervisedModule)
    held = {id(p) for p in module.anchor.held}
    blocks = list(module.predictor.encoder.blocks())
    assert held == {id(p) for p in blocks[0].parameters()}


# ------------------------------------------------------------------------ interpolation


def test_between_two_states():
    start = {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(3)}
    end = {"w": torch.tensor([1.0, 4.0]), "n": torch.tensor(9)}
    found = between(start, end, 0.25)
    assert found["w"].tolist() == [0.25, 2.5]
    assert int(found["n"]) == 9
    assert torch.equal(between(start, end, 0.0)["w"], start["w"])


@pytest.mark.parametrize(("best", "share"), [(0.0, 0.0), (0.62, 0.6), (1.0, 1.0)])
def test_the_share_with_the_least_error_is_taken(best, share):
    model = nn.Linear(1, 1, bias=False)
    start = {"weight": torch.tensor([[0.0]])}
    nn.init.constant_(model.weight, 1.0)
    found, errors = choose_between(
        model, start, lambda: abs(model.weight.item() - best)
    )
    assert found == share
    assert model.weight.item() == pytest.approx(share)
    assert list(errors) == list(SHARES)


def test_of_equal_ones_the_end_is_taken():
    model = nn.Linear(1, 1)
    start = {n: t.clone() + 1 for n, t in model.state_dict().items()}
    assert choose_between(model, start, lambda: 0.0)[0] == 1.0


def test_a_run_that_spoils_the_weights_goes_back_to_its_start(config, pretrained):
    """Interpolation at 0 gives the pretrained encoder with the fitted head.

    Its batch norms have the statistics of the training crystals.
    """
    config.optimizer = OptimizerSettings(lr=1.0, schedule="constant")
    config.head = RIDGE
    weights = finetune(tuning(config, pretrained, interpolate=True))
    found = results(config.out)
    assert found["interpolated"] == 0.0
    before, after = weights_of(pretrained), weights_of(weights)
    for name, tensor in before.items():
        if tensor.is_floating_point() and "running" not in name:
            assert torch.equal(after[name], tensor), name


# ---------------------------------------------------------------- gradual unfreezing


def small_predictor() -> Predictor:
    torch.manual_seed(0)
    encoder = make_encoder(**SMALL_ENCODER)
    outputs = Outputs([Target("y")], [Normalizer()])
    return Predictor(encoder, PropertyHead(8, 8), outputs, SMALL_GRAPH)


def test_blocks_thaw_from_the_top():
    predictor = small_predictor()
    predictor.freeze(0)
    thawing = thaw(predictor, 2, 10)
    blocks = list(predictor.encoder.blocks())
    assert thawing.waiting == [blocks[2], blocks[1]]
    for epoch, waiting in ((0, 2), (1, 2), (2, 1), (4, 0), (9, 0)):
        thawing.go_to(epoch)
        predictor.train()
        learning = [block.training for block in blocks]
        assert learning == [False] + [False] * waiting + [True] * (2 - waiting)
    predictor.freeze(None)
    assert all(p.requires_grad for p in predictor.parameters())


def test_a_block_that_waits_does_not_move(config, pretrained, monkeypatch):
    monkeypatch.setattr(finetuning, "SupervisedModule", Watched)
    config.trainer = replace(SHORT, epochs=5)
    finetune(tuning(config, pretrained, freeze=FreezeSettings(convolutions=0, thaw=2)))
    before = weights_of(pretrained)
    names = [n for n in before if before[n].is_floating_point() and "table" not in n]

    def moved(step: int, block: str) -> bool:
        own = [n for n in names if n.startswith(f"encoder.{block}")]
        assert own
        return any(not torch.equal(before[n], Watched.steps[step][n]) for n in own)

    order = ("embedding", "convolutions.0", "convolutions.1")
    for step, expected in (
        (5, (False, False, False)),
        (6, (False, False, True)),
        (11, (False, False, True)),
        (14, (False, True, True)),
    ):
        assert tuple(moved(step, block) for block in order) == expected, step


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_can_be_thawed(name):
    encoder = make_encoder(name, **ENCODERS[name].SMALL)
    outputs = Outputs([Target("y")], [Normalizer()])
    head = PropertyHead(encoder.crystal_width)
    predictor = Predictor(encoder, head, outputs, ENCODERS[name].GRAPH)
    thawing = thaw(predictor, 1, 20)
    assert not any(module.training for module in encoder.blocks())
    for p in predictor.parameters():
        p.grad = torch.ones_like(p)
    thawing.hold()
    assert all(p.grad is None for p in encoder.parameters())
    assert all(p.grad is not None for p in head.parameters())
    thawing.go_to(19)
    predictor.train()
    assert all(module.training for module in encoder.modules())


# --------------------------------------------------------------------- augmentation


def test_training_crystals_are_moved_and_others_are_not(config, dataset):
    view = augmentation(AugmentSettings(moved=0.1, strain=0.05))
    store = Store.open(dataset)
    batch = store.batch([0, 1, 2], ["density"])
    assert view is not None
    assert augmentation(AugmentSettings()) is None
    one, again, other = view(batch, 1), view(batch, 1), view(batch, 2)
    assert torch.equal(one.cell, again.cell)
    assert not torch.equal(one.cell, other.cell)
    assert torch.equal(one.targets, batch.targets)

    module = supervised.SupervisedModule(small_predictor(), OptimizerSettings())
    module.augment = view
    with torch.no_grad():
        module.eval()
        clean = [float(module.losses(batch, seed)["loss"]) for seed in (1, 2)]
        for part in module.modules():  # as in training, but with fixed statistics
            part.training = part is module
        moved = [float(module.losses(batch, seed)["loss"]) for seed in (1, 2)]
    assert clean[0] == clean[1]
    assert len({clean[0], *moved}) == 3


def test_augmented_runs_go_on_bit_for_bit(config, monkeypatch):
    config.augment = AugmentSettings(moved=0.05)
    whole = train(replace(config, out=config.out.with_name("whole")))
    plain = train(
        replace(config, out=config.out.with_name("plain"), augment=AugmentSettings())
    )
    assert not same(whole, plain)
    stopped(monkeypatch, train, config, 4)
    assert same(train(replace(config, resume=True)), whole)


# ------------------------------------------------------------------- all at once


@pytest.mark.slow
def test_all_of_fine_tuning_on_two_processes_and_resumed(
    config, pretrained, tmp_path, monkeypatch
):
    config.optimizer = PLAIN
    config.trainer = replace(
        SHORT, average="swa", average_span=0.6, threads=1, epochs=4
    )

    def settings(out: str, **more):
        return tuning(
            replace(config, out=tmp_path / out, head=RIDGE, **more),
            pretrained,
            l2_sp=0.1,
            layer_decay=0.5,
            interpolate=True,
            freeze=FreezeSettings(thaw=1),
        )

    one = finetune(settings("one"))
    found = together(2, finetune, settings("two"))
    assert found == [tmp_path / "two" / "weights.safetensors"] * 2, found
    theirs = weights_of(found[0])
    for name, tensor in weights_of(one).items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)
    for step in (4, 7):
        broken = settings(f"broken-{step}")
        stopped(monkeypatch, finetune, broken, step, press_ctrl_c)
        assert same(finetune(replace(broken, resume=True)), one)


# -------------------------------------------------------------------------- mistakes


def mistake(make, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make()


def test_settings_that_cannot_be(config, pretrained):
    mistake(
        lambda: tuning(config, pretrained, layer_decay=1.5),
        "`layer_decay` is 1.5 but must be above 0 and at most 1",
    )
    mistake(
        lambda: tuning(config, pretrained, l2_sp=-1.0),
        "`l2_sp` is -1.0 but must be at least 0",
    )
    plain = replace(config, head=HeadSettings(start="random"))
    mistake(
        lambda: tuning(plain, pretrained, interpolate=True),
        "`interpolate` needs a head that is fitted to the labels at the start; set",
    )
    mistake(lambda: FreezeSettings(thaw=0), "`freeze.thaw` is 0 but must be at least 1")
    mistake(
        lambda: FreezeSettings(convolutions="all", thaw=1),
        "`freeze.thaw` has nothing to thaw where `freeze.convolutions` is `all`",
    )
    mistake(
        lambda: finetune(tuning(config, pretrained, freeze=FreezeSettings(thaw=2))),
        r"`freeze.thaw` is 2 but the last of 3 blocks would begin to learn after 6 of "
        r"3 epochs; set it to 1, or enlarge `trainer.epochs`",
    )
    mistake(
        lambda: AugmentSettings(moved=2.0),
        "`augment.moved` is 2.0 but must be above 0 and at most 1 Å",
    )
    mistake(
        lambda: AugmentSettings(strain=0.0),
        "`augment.strain` is 0.0 but must be above 0 and at most 0.3",
    )
    mistake(
        lambda: TrainerSettings(average_span=2.0),
        "`average_span` is 2.0 but must be at most 1",
    )
    mistake(
        lambda: TrainerSettings(average_span=0.0),
        "`average_span` is 0.0 but must be positive",
    )
