"""What the passes of a Llama take: bytes and matrix products, by arithmetic on its shape alone.

Memory counts the tensors that model.py, grpo.py and lab/run keep, in bytes. The formulas are by
hand, because on the meta device PyTorch counts neither autocast's copies nor the peak of the
logits' backward pass; tests hold them against what autograd keeps and FlopCounterMode counts.

h hidden, q = heads * head_dim, kv = kv_heads * head_dim, I intermediate, V vocabulary, L layers;
P prompt columns, own columns come after them, K = P + own, S all tokens; rows are rollouts at a
time.
"""

import re

from model import LlamaConfig

FLOAT, BFLOAT = 4, 2  # bytes


class Cost:
    """The costs of one shape; half: its forward passes are in bfloat16."""

    def __init__(self, shape: LlamaConfig, half: bool = False):
        self.h, self.inner = shape.hidden_size, shape.intermediate_size
        self.layers = shape.num_hidden_layers
        self.heads, self.vocabulary = shape.num_attention_heads, shape.vocab_size
        self.q, self.kv = self.heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.half, self.size = half, BFLOAT if half else FLOAT
        # Weights in the layers' matrices: L (2 h q + 2 h kv + 3 h I), and in the output head: V h.
        self.body = self.layers * self.h * (2 * self.q + 2 * self.kv + 3 * self.inner)
        self.head = self.vocabulary * self.h
        # All weights: an untied head has a table of its own, and there are 2 L + 1 norms of h.
        tables = self.head * (1 if shape.tie_word_embeddings else 2)
        self.parameters = self.body + tables + (2 * self.layers + 1) * self.h

    def kv_cache(self, columns: int) -> int:
        """Keys and values of all layers: 2 L kv per column."""
        return columns * 2 * self.layers * self.kv * self.size

    def decoding(self, rows: int, group: int, prompt: int, room: int) -> int:
        """The cache (lab/run/sampling.py), and 4 V per row in float32 to choose a token.

        Prompts' columns count once a group of rows, and twice because they are copied when finished
        rows are dropped; own columns are there for the longest completion allowed from the start.
        """
        columns = -(-rows // group) * (2 * prompt + min(rows, group) * room)
        return self.kv_cache(columns) + 4 * rows * self.vocabulary * FLOAT

    def policy_activations(self, rows: int, length: int, fused: bool, recompute=False) -> int:
        """What autograd keeps of a policy micro-batch's layers.

        Per token and layer, in float32: 4 h (each norm's input and normalised input) and 2 factors
        of norms. In float32, or bfloat16 if half: the norms' outputs, 2 h, which autocast makes
        anew for each matrix that reads them, 5 h; 4 I (gate, silu(gate), up, their product); and
        attention. Fused: q, k, v, output, and a log-sum-exp per head in float32. Not fused: q, k,
        v, output, all q wide, because keys are repeated for the query heads, and heads * S weights.
        So it is on CUDA in float32, where no fused kernel takes grouped queries.
        recompute: each layer's input, h, and what one layer keeps, because it is run again.
        """
        attention = 2 * self.q + 2 * self.kv if fused else 4 * self.q + self.heads * length
        layer = ((5 if self.half else 2) * self.h + 4 * self.inner + attention) * self.size
        layer += (4 * self.h + 2 + (self.heads if fused else 0)) * FLOAT
        kept = self.layers * self.h * FLOAT + layer if recompute else self.layers * layer
        return rows * length * (kept + self.h * FLOAT)

    def autocast_weights(self) -> int:
        """Autocast's bfloat16 of every matrix, made once a micro-batch and kept by autograd.

        With recompute they go before the backward pass, whose layer is then counted too much.
        """
        return (self.body + self.head) * BFLOAT

    def policy_logits(self, rows: int, completion: int, chunk: int = 0) -> int:
        """In float32: log_softmax's output, and two more for the entropy or in the backward pass.

        3 n V, n positions at a time. Or, where that is more, the logits' gradient, n V, and the
        head's, V h, before it is accumulated: 4 bytes, with chunks 8 (their sum and the next
        one's); half: in bfloat16 and then in float32, 6.
        """
        logits = rows * min(completion, chunk or completion) * self.vocabulary
        gradient = 6 if self.half else 8 if 0 < chunk < completion else 4
        return max(3 * logits * FLOAT, logits * self.size + self.head * gradient)

    def mask_activations(self, rows: int, prompt: int, own: int, answer: int) -> int:
        """What autograd keeps of a mask step (lab/run/suffix.py), whose weights are frozen.

        Every layer: keys and values of all K. On all own rows but the last layer's, and on answer
        rows there: q, heads * K attention weights, h and 2 factors (the second norm), 3 I (gate,
        silu(gate), up); from the second layer on h and 2 factors for the first norm, on all own
        rows. Last norm and logits: 2 h and 3 V per answer row. Norms and logits are float32, the
        rest is bfloat16 if half.
        """
        columns, later_rows = prompt + own, (self.layers - 1) * own
        block_rows = later_rows + answer
        block = self.q + self.heads * columns + 3 * self.inner
        narrow = self.layers * 2 * self.kv * columns + block_rows * block
        wide = (later_rows + block_rows) * (self.h + 2)
        wide += answer * (2 * self.h + 3 * self.vocabulary)
        return rows * (narrow * self.size + wide * FLOAT)

    def softmax_gradients(self, rows: int, prompt: int, own: int) -> int:
        """In the backward pass of a layer's attention, the scores' gradient: heads * own * K.

        In float32; half: also the weights in float32, and the gradient in bfloat16.
        """
        size = 2 * FLOAT + BFLOAT if self.half else FLOAT
        return rows * self.heads * own * (prompt + own) * size

    def fixed_mask_memory(self, rows: int, prompt: int, own: int, answer: int) -> int:
        """What fixed masks hold at their fullest; nothing is kept to go backward.

        Keys and values of all layers: the prompts', with the completions', and with room for the
        rows after the reasoning; or the last and 3 V for the logits. In float32 two masks, own * T.
        """
        cache, logits = self.kv_cache(prompt + own), 3 * answer * self.vocabulary * FLOAT
        return rows * (cache + max(cache + self.kv_cache(prompt), logits) + 2 * own * own * FLOAT)

    def mask_step_flop(self, prompt: int, own: int, answer: int, backward=True) -> int:
        """Matrix products of a mask step, forward and backward through activations, per rollout.

        Layer 0's projections of q, k and v are constants, and its attention ends the backward pass;
        the last layer needs k and v of all own rows, the rest of it and the head only answer rows.
        backward: False for a fixed mask, which goes forward alone.
        """
        h, q, columns, twice = self.h, self.q, prompt + own, 4 if backward else 2
        rest = 2 * h * q + 3 * h * self.inner  # weights of q and o projections and MLP

        def products(rows):  # attention: 2 forward, 2 back over all columns, 2 over own ones
            return 2 * rows * q * (2 * columns + backward * (2 * columns + 2 * own))

        first = twice * own * (rest - h * q) + 2 * own * q * (2 + backward) * columns
        middle = twice * own * (2 * h * self.kv + rest) + products(own)
        last = twice * (own * 2 * h * self.kv + answer * rest) + products(answer)
        return first + (self.layers - 2) * middle + last + twice * answer * self.head

    def matrices(self, tokens: float, head_rows: float) -> float:
        """FLOP of a forward pass through the matrices: 2 per weight and token, or head row."""
        return 2 * (self.body * tokens + self.head * head_rows)

    def attention(self, tokens: float, context: float) -> float:
        """FLOP of a forward pass through attention: 4 q per token, column and layer."""
        return 4 * self.q * self.layers * tokens * context


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy or PyTorch says that memory is short."""
    said = "allocate memory|not enough memory|out of memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or re.search(said, str(error), re.IGNORECASE) is not None
