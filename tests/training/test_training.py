"""The training: one step by hand, no image lost, and all randomness from the seed and the epoch."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import Params, TrainParams
from mnist_pipeline.common.scores import EpochResult
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.model.inference import predict, score, set_up_torch
from mnist_pipeline.model.network import build_model
from mnist_pipeline.model.networks.convolutional import Net
from mnist_pipeline.training.calibration import calibrate
from mnist_pipeline.training.loop import learning_rate, seed_epoch, smoothed_cross_entropy, start_training
from mnist_pipeline.training.loop import train as train_on

Part = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    set_up_torch(threads=1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def training(small_data: Path, params: Params) -> Part:
    return load_digits(small_data, "train").tensors(params.data, torch.device("cpu"))


@pytest.fixture
def monitor(small_data: Path, params: Params) -> Part:
    return load_digits(small_data, "test")[:50].tensors(params.data, torch.device("cpu"))


def shrunk(params: Params, **changes: Any) -> TrainParams:
    return params.train.model_copy(update={"epochs": 1} | changes)


def train(
    model: Net, digits: Part, monitor: Part, params: TrainParams, seed: int, *on_batch: Any
) -> Iterator[EpochResult]:
    return train_on(start_training(model, params), digits, monitor, params, seed, *on_batch)


def weights_of(model: Net) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def trained_weights(
    params: Params, training: Part, seed: int, after_epoch: Callable[[], object] = lambda: None
) -> Tensor:
    model = build_model(params.model, seed)
    for _ in train(model, training, training, shrunk(params, epochs=2), seed):
        after_epoch()
    return weights_of(model)


def batches_of(model: Net) -> list[Tensor]:
    """Return a list that will hold the images of each batch that the network trains on."""
    batches: list[Tensor] = []

    def remember(module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        if module.training:
            batches.append(inputs[0])

    model.register_forward_pre_hook(remember)
    return batches


def adam(weight: Tensor, gradient: Tensor, rate: float, decay: float) -> Tensor:
    """Take Adam's first step, whose bias-corrected moments are the gradient and its square."""
    gradient = gradient + decay * weight
    return weight - rate * gradient / (gradient.abs() + 1e-8)


def adamw(weight: Tensor, gradient: Tensor, rate: float, decay: float) -> Tensor:
    return adam(weight * (1 - rate * decay), gradient, rate, decay=0)


def sgd(weight: Tensor, gradient: Tensor, rate: float, decay: float) -> Tensor:
    return weight - rate * (gradient + decay * weight)


@pytest.mark.parametrize("step", [adam, adamw, sgd])
def test_a_step_is_the_optimizers(params: Params, training: Part, step: Callable[..., Tensor]) -> None:
    images, labels = training[0][:129], training[1][:129]
    rate, decay = 0.01, 0.1  # large enough to tell the optimizers apart
    without_dropout = params.model.model_copy(update={"dropout": 0.0})

    by_hand = build_model(without_dropout, seed=0).train()
    loss = -by_hand(images)[range(129), labels].mean()
    loss.backward()
    weights = torch.cat([weight.detach().flatten() for weight in by_hand.parameters()])
    gradients = torch.cat([weight.grad.flatten() for weight in by_hand.parameters()])

    model = build_model(without_dropout, seed=0)
    one_step = shrunk(params, optimizer=step.__name__, learning_rate=rate, weight_decay=decay)
    [result] = train(model, (images, labels), (images, labels), one_step, seed=0)
    assert result.training.loss == pytest.approx(loss.item(), abs=1e-4)
    stepped = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    clear = gradients.abs() > 1e-5  # not mere rounding, as of a bias that batch normalisation takes away again
    assert clear.sum() > 15_000
    assert torch.allclose(stepped[clear], step(weights, gradients, rate, decay)[clear], atol=1e-4)


def test_the_same_seed_trains_the_same_bits(params: Params, training: Part) -> None:
    weights = trained_weights(params, training, seed=0)
    torch.manual_seed(99)
    assert torch.equal(trained_weights(params, training, seed=0), weights)
    assert not torch.equal(trained_weights(params, training, seed=1), weights)


def test_the_training_seed_matters_beside_the_weights(params: Params, training: Part) -> None:
    models = [build_model(params.model, seed=0) for _ in range(2)]
    for seed, model in enumerate(models):
        list(train(model, training, training, shrunk(params), seed))
    assert not torch.equal(weights_of(models[0]), weights_of(models[1]))


def test_what_happens_between_epochs_does_not_change_the_training(params: Params, training: Part) -> None:
    weights = trained_weights(params, training, seed=0)
    assert torch.equal(trained_weights(params, training, seed=0, after_epoch=lambda: torch.rand(5)), weights)


@pytest.mark.parametrize(("seed", "epoch"), [(0, 2), (1, 1), (1, 0), (2**32 - 1, 1)])
def test_an_epochs_randomness_depends_on_seed_and_epoch_alone(seed: int, epoch: int) -> None:
    seed_epoch(0, 1)
    first = torch.rand(3)
    seed_epoch(seed, epoch)
    drawn = torch.rand(3)
    assert not torch.equal(drawn, first)
    seed_epoch(0, 1)
    assert torch.equal(torch.rand(3), first)
    seed_epoch(seed, epoch)
    assert torch.equal(torch.rand(3), drawn)


def test_an_uneven_last_batch_loses_no_image(params: Params, training: Part, monitor: Part) -> None:
    model, numbers = build_model(params.model, seed=0), []
    batches = batches_of(model)
    [result] = train(model, training, monitor, shrunk(params), 0, lambda number, loss: numbers.append(number))
    assert numbers == [0, 1, 2]
    assert [len(batch) for batch in batches] == [129, 129, 42]
    assert (result.training.total, result.monitor.total) == (300, 50)
    used = torch.cat(batches).flatten(1).unique(dim=0)
    assert torch.equal(used, training[0].flatten(1).unique(dim=0))  # unique sorts: all of them, in whatever order


def test_labels_stay_with_their_images(params: Params, training: Part) -> None:
    model, losses = build_model(params.model.model_copy(update={"dropout": 0.0}), seed=0), []
    batches = batches_of(model)
    label_of = {image.numpy().tobytes(): label for image, label in zip(*training, strict=True)}
    frozen = shrunk(params, optimizer="sgd", learning_rate=1e-12)
    list(train(model, training, training, frozen, 0, lambda number, loss: losses.append(loss.item())))
    remembered = list(batches)
    expected = [
        F.nll_loss(model.train()(batch), torch.stack([label_of[image.numpy().tobytes()] for image in batch])).item()
        for batch in remembered
    ]
    assert losses == pytest.approx(expected, abs=1e-5)


def test_the_loss_is_the_mean_over_images_not_over_batches(params: Params, training: Part, monitor: Part) -> None:
    losses: list[float] = []
    model = build_model(params.model, seed=0)
    [result] = train(model, training, monitor, shrunk(params), 0, lambda number, loss: losses.append(loss.item()))
    first, second, last = losses
    assert result.training.loss == pytest.approx((129 * first + 129 * second + 42 * last) / 300)
    assert result.training.loss != pytest.approx((first + second + last) / 3)


def test_the_monitor_scores_the_network_after_the_epoch(params: Params, training: Part, monitor: Part) -> None:
    model = build_model(params.model, seed=0)
    for result in train(model, training, monitor, shrunk(params, epochs=2), 0):
        expected = score(predict(model, monitor[0], batch_size=50), monitor[1])
        assert result.monitor.loss == pytest.approx(expected.loss)
        assert result.monitor.correct == expected.correct


def test_the_learning_rate_steps_down(params: Params, training: Part, monitor: Part) -> None:
    few = training[0][:20], training[1][:20]
    scheduler = params.train.scheduler.model_copy(update={"step_size": 2})
    results = list(train(build_model(params.model, 0), few, monitor, shrunk(params, epochs=5, scheduler=scheduler), 0))
    assert [result.epoch for result in results] == [1, 2, 3, 4, 5]
    assert [result.learning_rate for result in results] == pytest.approx([0.001, 0.001, 0.0005, 0.0005, 0.00025])
    assert [result.next_learning_rate for result in results[:-1]] == [result.learning_rate for result in results[1:]]


def test_a_step_is_taken_at_the_rate_of_its_epoch(params: Params, training: Part, monitor: Part) -> None:
    scheduler = params.train.scheduler.model_copy(update={"step_size": 1, "gamma": 1e-9})
    model = build_model(params.model, seed=0)
    weights = [
        model.block3.conv7.weight.detach().clone()
        for _ in train(model, training, monitor, shrunk(params, epochs=2, scheduler=scheduler), 0)
    ]
    assert torch.allclose(weights[0], weights[1], rtol=0, atol=1e-8)


def test_each_epoch_has_an_order_of_its_own(params: Params, training: Part, monitor: Part) -> None:
    model = build_model(params.model, seed=0)
    batches = batches_of(model)
    list(train(model, training, monitor, shrunk(params, epochs=3), 0))
    epochs = [torch.cat(batches[start : start + 3]) for start in (0, 3, 6)]
    assert not torch.equal(epochs[0], training[0])
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


def test_a_loss_that_explodes_ends_the_training(params: Params, training: Part, monitor: Part) -> None:
    explosive = shrunk(params, epochs=3, optimizer="sgd", learning_rate=1e6)
    with pytest.raises(UserError, match=r"^epoch 1: .*train\.learning_rate \(1e\+06\)$"):
        list(train(build_model(params.model, seed=0), training, monitor, explosive, 0))


@pytest.mark.parametrize("part", ["training", "monitor"])
def test_pixels_that_are_no_numbers_end_the_training(params: Params, training: Part, monitor: Part, part: str) -> None:
    parts = {"training": training, "monitor": monitor}
    parts[part][0][7, 0, 14, 14] = torch.nan
    with pytest.raises(UserError, match=r"^epoch 1: .*not finite"):
        list(train(build_model(params.model, seed=0), parts["training"], parts["monitor"], shrunk(params), 0))


def test_the_network_learns(params: Params, training: Part) -> None:
    model = build_model(params.model, seed=0)
    results = list(train(model, training, training, shrunk(params, epochs=8, batch_size=32), 0))
    assert results[-1].training.loss < results[0].training.loss
    assert results[-1].monitor.accuracy > 0.5


def test_a_row_names_what_history_and_tracking_show(params: Params, training: Part, monitor: Part) -> None:
    [result] = train(build_model(params.model, seed=0), training, monitor, shrunk(params), 0)
    assert isinstance(result, EpochResult)
    assert result.row() == {
        "epoch": 1,
        "learning_rate": 0.001,
        "train_loss": result.training.loss,
        "train_accuracy": result.training.accuracy,
        "monitor_loss": result.monitor.loss,
        "monitor_accuracy": result.monitor.accuracy,
    }


@pytest.mark.parametrize("gamma", [0.5, 0.1])
def test_the_learning_rate_falls_in_steps_like_torchs(params: Params, gamma: float) -> None:
    scheduler = params.train.scheduler.model_copy(update={"gamma": gamma})
    train_params = params.train.model_copy(update={"scheduler": scheduler})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train_params.learning_rate)
    torchs = torch.optim.lr_scheduler.StepLR(optimizer, scheduler.step_size, gamma)
    for epoch in range(train_params.epochs):
        for progress in (epoch, epoch + 0.999):
            assert learning_rate(train_params, progress) == pytest.approx(torchs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        torchs.step()


def test_the_learning_rate_goes_through_one_cycle_like_torchs(params: Params) -> None:
    scheduler = params.train.scheduler.model_copy(update={"kind": "one_cycle"})
    train_params = params.train.model_copy(update={"scheduler": scheduler, "epochs": 10})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    steps = 1000
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, train_params.learning_rate, steps, pct_start=scheduler.warm_up, cycle_momentum=False
    )
    for step in range(steps):
        found = learning_rate(train_params, 10 * step / steps)
        assert found == pytest.approx(torchs.get_last_lr()[0], abs=train_params.learning_rate / 100)
        optimizer.step()
        if step < steps - 1:
            torchs.step()
    assert learning_rate(train_params, 10) == 0


def test_the_averaged_network_is_the_moving_average_of_weights_with_statistics_of_its_own(
    params: Params, training: Part, monitor: Part
) -> None:
    train_params = shrunk(params, averaging=0.75, batch_size=100)
    run = start_training(build_model(params.model, 0), train_params)
    seen = [weights_of(cast("Net", run.model)).clone()]
    list(
        train_on(
            run, training, monitor, train_params, 0, lambda *_: seen.append(weights_of(cast("Net", run.model)).clone())
        )
    )
    expected = seen[1]  # the first step's weights begin it
    for weights in seen[2:]:
        expected = 0.75 * expected + 0.25 * weights
    found = weights_of(cast("Net", run.network))
    learned = torch.cat(
        [
            torch.full((tensor.numel(),), name in dict(run.model.named_parameters()))
            for name, tensor in run.model.state_dict().items()
        ]
    )
    torch.testing.assert_close(found[learned], expected[learned])
    first = cast("Net", run.network).block1
    of_images = first.conv1(training[0]).mean(dim=(0, 2, 3))
    torch.testing.assert_close(first.bn1.running_mean, of_images, atol=1e-5, rtol=1e-4)


def test_the_averaged_network_is_what_the_monitor_scores(params: Params, training: Part, monitor: Part) -> None:
    train_params = shrunk(params, averaging=0.9)
    run = start_training(build_model(params.model, 0), train_params)
    (result,) = train_on(run, training, monitor, train_params, 0)
    assert result.monitor == score(predict(run.network, monitor[0], 1000), monitor[1])
    assert result.monitor != score(predict(run.model, monitor[0], 1000), monitor[1])


def test_label_smoothing_is_torchs(training: Part) -> None:
    logits = torch.randn(len(training[1]), 10, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(logits, training[1], label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(smoothed_cross_entropy(logits.log_softmax(dim=1), training[1], 0.1), expected)


def test_after_smoothed_labels_the_probabilities_fit_again(params: Params, training: Part, monitor: Part) -> None:
    smoothed = shrunk(params, epochs=8, batch_size=16, label_smoothing=0.2)
    run = start_training(build_model(params.model, 0), smoothed)
    list(train_on(run, training, monitor, smoothed, 0))
    found = predict(run.network, training[0], 1000)
    loss, flatter, steeper = (score((found * by).log_softmax(dim=1), training[1]).loss for by in (1, 0.95, 1.05))
    assert loss < min(flatter, steeper)


def test_a_network_whose_last_layer_is_not_its_output_cannot_learn_smoothed_labels(training: Part) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Sigmoid(), nn.LogSoftmax(dim=1))
    with pytest.raises(UserError, match=r"^train\.label_smoothing needs a network"):
        calibrate(network, training, 1000)


def test_the_last_epochs_are_clean(params: Params, training: Part, monitor: Part) -> None:
    augmentation = params.train.augmentation.model_copy(update={"rotation": 20.0, "clean_epochs": 1})
    train_params = shrunk(params, epochs=2, augmentation=augmentation, batch_size=len(training[0]))
    model = build_model(params.model, 0)
    batches = batches_of(model)
    list(train(model, training, monitor, train_params, 0))
    first, last = (batch.flatten(1).sum(dim=1).sort().values for batch in batches)
    clean = training[0].flatten(1).sum(dim=1).sort().values
    torch.testing.assert_close(last, clean)
    assert not torch.allclose(first, clean)
