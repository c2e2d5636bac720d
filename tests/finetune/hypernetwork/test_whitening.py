"""Whitened contexts: their statistics, the plain file that is written, and what they gain."""

from pathlib import Path

import torch
from torch import Tensor

from finetune.hypernetwork.files import read_hypernetwork
from finetune.hypernetwork.network import Hypernetwork
from finetune.hypernetwork.whitening import Whitening
from tests.conftest import draw, draw_weights, relative_error
from tests.finetune.hypernetwork.a1111 import WIDTH, a1111, check_like_a1111


def skewed(name: str, count: int, scale: float = 1.0) -> Tensor:
    """Contexts [count, WIDTH] like a text's: far from 0, and stronger in some directions than in others."""
    spread = torch.diag(torch.tensor([10.0, 3.0, 1.0, 1.0, 0.3, 0.3], dtype=torch.float64))
    return scale * (draw(name, (count, WIDTH)) @ spread @ draw("mixing", (WIDTH, WIDTH)) + 20)


def whitened(network: Hypernetwork, *contexts: Tensor) -> Hypernetwork:
    network.whiten(lambda: [network(x[None], x[None]) for x in contexts])
    return network


def moments(*contexts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of contexts, each of which counts the same, whatever its length."""
    mean = torch.stack([x.mean(0) for x in contexts]).mean(0)
    return mean, torch.stack([(x - mean).T @ (x - mean) / len(x) for x in contexts]).mean(0)


def test_whitening_makes_mean_0_and_nearly_the_unit_as_covariance():
    contexts = skewed("long", 4000), skewed("short", 40, 0.5)
    covariance = moments(*contexts)[1]
    floor = 0.01 * covariance.diag().mean() * torch.eye(WIDTH)
    network = whitened(Hypernetwork([WIDTH, 4]), *contexts, *(x[:, :4] for x in contexts)).double()
    whitening, other = (module for module in network.modules() if isinstance(module, Whitening))
    mean, white = moments(*map(whitening, contexts))
    assert mean.abs().max() < 1e-3
    assert relative_error(white @ (covariance + floor), covariance) < 1e-4
    assert relative_error(whitening.matrix.T, whitening.matrix) < 1e-6  # it turns nothing that it need not
    assert other.mean.shape == (4,)


def test_what_was_trained_on_whitened_contexts_is_written_as_a_plain_file(tmp_path: Path):
    for options in ((1, 2, 1), "tanh", "Normal"), ((1, 1), "linear", "Normal", True, True):
        network = whitened(draw_weights(Hypernetwork([WIDTH], *options)), skewed("seen", 100))
        state = {key: value.clone() for key, value in network.state_dict().items()}
        network.save(tmp_path / "net.pt")
        check_like_a1111(tmp_path / "net.pt")
        content = torch.load(tmp_path / "net.pt", weights_only=True)
        x = skewed("unseen", 10)
        for index, changed in enumerate(network.double()(x, x)):
            assert relative_error(changed - x, a1111(content, index, x) - x) < 1e-5
        assert state.keys() == read_hypernetwork(tmp_path / "net.pt").state_dict().keys()
        assert all(torch.equal(state[key], value.float()) for key, value in network.state_dict().items())


def test_processes_share_one_whitening():
    contexts = [skewed("one", 100), skewed("other", 50, 2.0)]
    alone = whitened(Hypernetwork([WIDTH]), *contexts)
    sums: list[Tensor] = []
    for x in contexts:  # what each process has seen
        process = Hypernetwork([WIDTH])
        process.whiten(lambda n=process, x=x: n(x[None], x[None]), lambda seen: sums.append(seen.clone()) or seen)
    shared = Hypernetwork([WIDTH])
    shared.whiten(lambda: shared(contexts[0][None], contexts[0][None]), lambda seen: sums[0] + sums[1])
    for a, b in zip(alone.buffers(), shared.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def test_whitening_learns_what_tells_contexts_apart():
    """The same steps, at the best of several rates each: what hangs on the weak directions is learnt several times as
    far on whitened contexts."""
    seen = skewed("tokens", 512).float()
    weak = (draw("tokens", (512, WIDTH))[:, 4:] > 0).float().sum(1, keepdim=True)  # of which the spread is 0.3

    def error(white: bool, rate: float) -> float:
        torch.manual_seed(0)
        network = Hypernetwork([WIDTH], (1, 4, 1), "swish", "Zero")
        if white:
            whitened(network, seen)
        optimizer = torch.optim.Adam(network.parameters(), rate)

        def loss() -> Tensor:
            return (network(seen, seen)[0] - seen - weak).square().mean()

        for _ in range(100):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return loss().item()

    rates = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
    plain, white = (min(error(how, rate) for rate in rates) for how in (False, True))
    assert white < 0.5 * plain, (plain, white)
