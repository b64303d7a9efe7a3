"""What a stage could not do with a network is found before the first step of the training."""

from pathlib import Path

import pytest
import torch
from support import DATA, ROOT
from support.networks import network_file

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import Params, load_params, merge, params_type
from mnist_pipeline.common.yaml_file import read_sections
from mnist_pipeline.data.digits import load_digits
from mnist_pipeline.training.loop import Training
from mnist_pipeline.training.rehearsal import prepare_training

MLP = """
class Net(nn.Module):
    def __init__(self, classes: int, hidden: int = 8):
        super().__init__()
        self.first = nn.Linear(784, hidden)
        self.last = nn.Linear(hidden, classes)

    def forward(self, images):
        return {answer}
"""
HIDDEN = "F.relu(self.first(images.flatten(1)))"
LOG_PROBABILITIES = f"F.log_softmax(self.last({HIDDEN}), dim=1)"
WRONG = {
    "no log-softmax": (f"self.last({HIDDEN})", "log-probabilities (images, 10): end forward with F.log_softmax"),
    "probabilities": (f"self.last({HIDDEN}).softmax(1)", "log-probabilities (images, 10)"),
    "softmax over the images": (LOG_PROBABILITIES.replace("dim=1", "dim=0"), "log-probabilities (images, 10)"),
    "too many answers": ("F.log_softmax(self.first(images.flatten(1)), dim=1)", "log-probabilities (images, 10)"),
    "a row too many": (f"{LOG_PROBABILITIES}.unsqueeze(1)", "log-probabilities (images, 10)"),
    "not a number": (f"{LOG_PROBABILITIES} * torch.nan", "log-probabilities (images, 10)"),
    "shapes that do not fit": (
        "F.log_softmax(self.last(images.flatten(1)), dim=1)",
        "mine.py, line 12: RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x784 and 8x10)",
    ),
    "looks at the other images": (
        f"F.log_softmax(self.last({HIDDEN} - {HIDDEN}.mean(0)), dim=1)",
        "answer each image by itself",
    ),
    "nothing to learn from": (f"{LOG_PROBABILITIES}.detach()", "does not require grad"),
    "one way for each sign": (
        f"{LOG_PROBABILITIES} if images.sum() > 0 else -(-{LOG_PROBABILITIES})",
        "mine.py, line 12: GuardOnDataDependentSymNode",
    ),
    "outside of torch": (
        f"{LOG_PROBABILITIES} + torch.tensor(images.detach().numpy().sum() * 0)",
        "mine.py, line 12",
    ),
}


def own_params(**model: object) -> Params:
    sections = read_sections(ROOT / "params.yaml")
    del sections["gate"]
    sections["model"] = {"network": "mine", "parameter_budget": 100_000, **model}
    return params_type(sections).model_validate(merge(sections, {"train": {"batch_size": 64}}))


def prepare(params: Params, digits: tuple[torch.Tensor, torch.Tensor]) -> Training:
    return prepare_training(digits, params.data, params.model, params.train, params.seed)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    return load_digits(DATA, "train").tensors(load_params(ROOT / "params.yaml").data, torch.device("cpu"))


def refusal(tmp_path: Path, digits: tuple[torch.Tensor, torch.Tensor], body: str, **model: object) -> str:
    with network_file(tmp_path, body), pytest.raises(UserError) as refused:
        prepare(own_params(**model), digits)
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(("answer", "reason"), WRONG.values(), ids=WRONG)
def test_a_network_that_a_stage_could_not_use_is_refused(
    tmp_path: Path, digits: tuple[torch.Tensor, torch.Tensor], answer: str, reason: str
) -> None:
    assert reason in refusal(tmp_path, digits, MLP.format(answer=answer))


def test_weights_that_share_memory_cannot_be_saved(tmp_path: Path, digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    body = MLP.format(answer=LOG_PROBABILITIES)
    tied = body.replace(
        "\n\n    def forward",
        "\n        self.tied = nn.Linear(784, hidden)\n        self.tied.weight = self.first.weight\n\n    def forward",
    )
    assert "share memory" in refusal(tmp_path, digits, tied)


def test_a_last_batch_of_one_image_is_rehearsed(tmp_path: Path, digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    body = MLP.format(answer=f"F.log_softmax(self.last(self.norm({HIDDEN})), dim=1)")
    body = body.replace("\n\n    def forward", "\n        self.norm = nn.BatchNorm1d(hidden)\n\n    def forward")
    one_more = (digits[0][:65], digits[1][:65])
    assert "more than 1 value per channel" in refusal(tmp_path, one_more, body)
    with network_file(tmp_path, body):
        prepare(own_params(), (digits[0][:66], digits[1][:66]))


def test_a_network_over_its_budget_is_refused(tmp_path: Path, digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    body = MLP.format(answer=LOG_PROBABILITIES)
    assert "has 7,939,675 parameters" in refusal(tmp_path, digits, body, hidden=9987)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon", "sgd"])
def test_a_sound_network_is_left_as_it_was_built(
    tmp_path: Path, digits: tuple[torch.Tensor, torch.Tensor], optimizer: str
) -> None:
    params = None
    with network_file(tmp_path, MLP.format(answer=LOG_PROBABILITIES)):
        params = own_params(hidden=16)
        params = params.model_copy(update={"train": params.train.model_copy(update={"optimizer": optimizer})})
        training = prepare(params, digits)
        torch.manual_seed(params.seed)
        first, last = torch.nn.Linear(784, 16), torch.nn.Linear(16, 10)
    weights = dict(training.model.named_parameters())
    assert torch.equal(weights["first.weight"], first.weight)
    assert torch.equal(weights["last.bias"], last.bias)
    assert all(tensor.grad is None for tensor in weights.values())
    assert training.history == []
