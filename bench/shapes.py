"""The shapes that benchmarks run: real models' sizes. L layers, D hidden, H heads, G kv heads, d head width,
F MLP, V words."""

from typing import NamedTuple


class Shape(NamedTuple):
    L: int
    D: int
    H: int
    G: int
    d: int
    F: int
    V: int
    tied: bool = False  # the embedding is the head, too
    window: int | None = None

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of one layer's matrices, by Hugging Face's names."""
        D, H, G, d, F = self.D, self.H, self.G, self.d, self.F
        return {
            "self_attn.q_proj": (H * d, D),
            "self_attn.k_proj": (G * d, D),
            "self_attn.v_proj": (G * d, D),
            "self_attn.o_proj": (D, H * d),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }

    @property
    def prompt_ops(self) -> int:
        """Multiplications and additions of a prompt token's linear maps, if its logits are not asked for."""
        return 2 * self.L * sum(n * k for n, k in self.matrices().values())


SHAPES = {
    "tiny": Shape(2, 64, 2, 1, 32, 96, 320),  # shows that a benchmark runs
    "smollm2-135m": Shape(30, 576, 9, 3, 64, 1536, 49152, tied=True),
    "llama-1.1b": Shape(22, 2048, 32, 4, 64, 5632, 32000),
    "mistral-7b": Shape(32, 4096, 32, 8, 128, 14336, 32000, window=4096),
}
