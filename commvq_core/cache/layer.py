"""One layer's cache: codes for old tokens, exact keys and values for sinks and the newest ones.

The life of a token: `update` appends it to the exact window; once a batch of tokens has `window`
newer ones behind it, they are un-rotated, encoded and dropped from the window. Codes are
append-only: a token is encoded once and never again. Slot s of the codes is token s of the
sequence, sinks included; a sink's code is stored too (so that slots stay aligned) but attention
uses its exact copy.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from commvq_core.cache.store import CodeStore
from commvq_core.codecs.attention import CodedAttention
from commvq_core.codecs.base import Codec, require_tensor
from commvq_core.rope import Rotary, to_pairs, unrotate_pairs

if TYPE_CHECKING:
    from commvq_core.cache.positions import Positions

# Tensors of a layer's state beside its codes.
_STATE = ("keys", "values", "sink_keys", "sink_values", "first_valid")
# crop(n) of older releases takes the length to keep.
_CROP_REMOVES = "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters
ENCODE_BATCH = 32  # steps of one token after which they leave the window together


class CommVQLayer(CacheLayerMixin):
    """The compressed cache of one attention layer. See the module's docstring.

    `keys`/`values` [batch, kv_heads, w, head_dim] are the exact window, rotated, in model order;
    they begin at token `exact_start`. `strict` is explained at CommVQCache.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        key_codec: Codec,
        value_codec: Codec,
        rotary: Rotary,
        positions: Positions,
        *,
        window: int,
        sinks: int,
        strict: bool,
        exact_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.key_codec, self.value_codec = key_codec, value_codec
        self.rotary = rotary
        self.positions = positions
        self.window, self.sinks, self.strict = window, sinks, strict
        self.exact_dtype = exact_dtype
        self._attentions: dict[int, CodedAttention | None] = {}
        self.group = math.lcm(key_codec.group_tokens, value_codec.group_tokens)
        self._empty()

    def _empty(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False
        self.key_codes, self.value_codes = CodeStore(), CodeStore()
        self.exact_start = 0
        self.first_valid: Tensor | None = None  # [batch] first slot that is not padding
        self.last_first = 0  # the largest of `first_valid`, or more: known to the host
        self.known_length = 0  # how many slots `first_valid` was learnt from
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None
        self.steps = 0  # of one token each, since tokens were encoded
        self.awaits_attention = False  # updated, and the attention function not yet called
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}  # of the window: itself, all of the room

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch, dtype and device from the first states."""
        self.model_dtype, self.device = key_states.dtype, key_states.device
        self.dtype = self.exact_dtype or self.model_dtype
        self.keys = key_states[:, :, :0].to(self.dtype)
        self.values = value_states[:, :, :0].to(self.dtype)
        self.is_initialized = True

    @property
    def code_length(self) -> int:
        """How many tokens have codes: slots 0 .. code_length - 1."""
        return self.key_codes.length

    @property
    def all_begun(self) -> bool:
        """Whether every row has a slot that is not padding."""
        return self.last_first < self.known_length

    def attention(self, rows: int) -> CodedAttention | None:
        """What attends over the codes for `rows` rows of queries a KV head, if anything does."""
        if rows not in self._attentions:
            self._attentions[rows] = self.key_codec.attention(self.value_codec, rows)
        return self._attentions[rows]

    def begin_rows(self, first_valid: Tensor | None, length: int) -> None:
        """Rows begin at `first_valid` [batch] (None: all at 0), as learnt from `length` slots."""
        self.known_length = length
        if first_valid is None:
            assert self.keys is not None
            batch, device = self.keys.shape[0], self.keys.device
            self.first_valid = torch.zeros(batch, dtype=torch.long, device=device)
            self.last_first = 0
        else:
            self.first_valid = first_valid
            self.last_first = int(first_valid.max())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append rotated states [batch, kv_heads, n, head_dim]; returns the exact window.

        The attention function (attention.py) reads the layer itself; the returned tensors are the
        whole context only while nothing has been encoded.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.awaits_attention = True
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys.to(self.model_dtype), self.values.to(self.model_dtype)

    def _appended(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        """`old` and `new`; single tokens go where there is room for as many as are encoded at once.

        What was given out before stays as it is: room is behind all of it.
        """
        length, count = old.shape[2], new.shape[2]
        window, room = self._rooms.get(name, (None, old))
        if window is not old or length + count > room.shape[2]:
            self._rooms.pop(name, None)
            if count > 1:
                return torch.cat((old, new.to(old.dtype)), dim=2)
            capacity = -(-(length + 1) // ENCODE_BATCH) * ENCODE_BATCH
            room = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            room[:, :, :length] = old
        room[:, :, length : length + count] = new
        window = room[:, :, : length + count]
        self._rooms[name] = (window, room)
        return window

    def sink_slots(self) -> Tensor:
        """[batch, sinks] slots of the first tokens of each row, padding passed over.

        All of them are below `last_first + sinks`.
        """
        assert self.first_valid is not None
        steps = torch.arange(self.sinks, device=self.first_valid.device)
        return self.first_valid[:, None] + steps

    def encode_until(self, stop: int) -> None:
        """Give codes to all tokens before `stop`; their exact copies stay until `drop_encoded`.

        Tokens of a group that reaches past `stop` wait for the rest of it.
        """
        start = self.code_length
        stop -= stop % self.group
        if stop <= start:
            return
        assert self.keys is not None
        assert self.values is not None
        part = slice(start - self.exact_start, stop - self.exact_start)
        keys, values = self.keys[:, :, part], self.values[:, :, part]
        self._keep_sinks(start, stop)
        self.key_codes.append(self.key_codec.encode(self._plain_keys(keys, start, stop)))
        self.value_codes.append(self.value_codec.encode(values.float()))

    def first_exact(self, first: int, count: int) -> tuple[int, ...]:
        """The first token that each of `count` queries from slot `first` on sees exactly.

        That is the code length for all of them, but when `strict`: then what decoding one by one
        would give. After a crop into the codes the window is shorter: what went before is codes.
        """
        if not self.strict:
            return (self.code_length,) * count
        oldest = range(first - self.window + 1, first - self.window + 1 + count)
        return tuple(max(self.exact_start, slot - slot % self.group) for slot in oldest)

    def _plain_keys(self, keys: Tensor, start: int, stop: int) -> Tensor:
        """Rotated keys in model order -> canonical keys before RoPE, float32."""
        rotary = self.rotary
        pairs = to_pairs(keys.float(), rotary_dim=rotary.rotary_dim, layout=rotary.layout)
        if rotary.rotary_dim == 0:
            return pairs
        cos, sin = self.positions.tables(rotary, start, stop, self.model_dtype)
        return unrotate_pairs(pairs, cos, sin)

    def _keep_sinks(self, start: int, stop: int) -> None:
        if self.sinks == 0:
            return
        assert self.keys is not None
        assert self.values is not None
        batch, heads, _, dim = self.keys.shape
        if self.sink_keys is None or self.sink_values is None:
            self.sink_keys = self.keys.new_zeros(batch, heads, self.sinks, dim)
            self.sink_values = self.values.new_zeros(batch, heads, self.sinks, dim)
        if start >= self.last_first + self.sinks:
            return
        slots = self.sink_slots()
        inside = (slots >= start) & (slots < stop)
        rows, columns = inside.nonzero(as_tuple=True)
        where = slots[rows, columns] - self.exact_start
        self.sink_keys[rows, :, columns] = self.keys[rows, :, where]
        self.sink_values[rows, :, columns] = self.values[rows, :, where]

    def drop_encoded(self) -> None:
        """Free the exact copies of tokens that have codes."""
        extra = self.code_length - self.exact_start
        if extra > 0:
            assert self.keys is not None
            assert self.values is not None
            # Clones, since a slice would keep the whole chunk's memory alive.
            self.keys = self.keys[:, :, extra:].clone()
            self.values = self.values[:, :, extra:].clone()
            self._rooms.clear()
            self.exact_start = self.code_length

    def decode_keys(self, start: int, stop: int) -> Tensor:
        """Canonical keys before RoPE of the tokens start..stop, float32."""
        return self.key_codec.decode(self.key_codes.slice(start, stop))

    def decode_values(self, start: int, stop: int) -> Tensor:
        """Values of the tokens start..stop, float32."""
        return self.value_codec.decode(self.value_codes.slice(start, stop))

    # The contract of transformers' caches.

    def get_seq_length(self) -> int:
        """Tokens seen."""
        if not self.is_initialized or self.keys is None:
            return 0
        return self.exact_start + self.keys.shape[2]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(length, offset) of the columns that an attention mask needs: every token, from 0.

        Older releases of transformers pass the new tokens' positions instead of their number.
        """
        count = len(query_length) if isinstance(query_length, Tensor) else query_length
        return self.get_seq_length() + count, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older releases of transformers

    def reset(self) -> None:
        """Forget everything."""
        self._empty()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens.

        Positive numbers mean what they mean to the installed transformers' own layers: the length
        to keep until 5.16, an error since.
        """
        if tokens_to_remove > 0 and _CROP_REMOVES:
            raise ValueError(
                f"crop takes a negative number of tokens to remove, not {tokens_to_remove}"
            )
        if not self.is_initialized:
            return
        assert self.keys is not None
        assert self.values is not None
        now = self.get_seq_length()
        keeps = not _CROP_REMOVES and tokens_to_remove >= 0
        length = max(0, tokens_to_remove if keeps else now + tokens_to_remove)
        if length >= now:
            return
        if length < self.exact_start:
            if length % self.group:
                raise ValueError(f"these codes can only be cut at multiples of {self.group} tokens")
            # The newest tokens left are codes; what follows will be appended behind them.
            self.key_codes.crop(length)
            self.value_codes.crop(length)
            self.exact_start = length
        kept = length - self.exact_start
        if self.first_valid is not None:
            self.known_length = min(self.known_length, length)
        self.keys, self.values = self.keys[:, :, :kept], self.values[:, :, :kept]
        self._rooms.clear()
        if length == 0:
            self._empty()

    def _each_batch_tensor(self, change: Any) -> None:
        self._rooms.clear()
        for store in (self.key_codes, self.value_codes):
            store.apply(change)
        for name in _STATE:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows of the batch, as beam search asks for."""
        self._each_batch_tensor(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._each_batch_tensor(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._each_batch_tensor(lambda t: t[indices.to(t.device), ...])

    def offload(self) -> None:
        """Move the layer's data to the CPU."""
        self._each_batch_tensor(lambda t: t.to("cpu"))

    def prefetch(self) -> None:
        """Move the layer's data back to its device."""
        if self.is_initialized:
            self._each_batch_tensor(lambda t: t.to(self.device))

    def state(self) -> dict[str, Tensor]:
        """All that the layer holds of its context, by name, for `restore`; empty when it is."""
        if not self.is_initialized:
            return {}
        found = {name: getattr(self, name) for name in _STATE}
        if self.code_length:
            found["key_codes"] = self.key_codes.slice(0, self.code_length)
            found["value_codes"] = self.value_codes.slice(0, self.code_length)
        found["steps"] = torch.tensor([self.steps])
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def restore(self, state: Mapping[str, Tensor], model_dtype: torch.dtype) -> None:
        """Become what `state` was taken from, in an empty layer of the same settings.

        Raises ValueError naming a tensor that is missing, or of a wrong shape or dtype.
        """
        self._empty()
        if not state:
            return
        keys = state.get("keys")
        if keys is None or keys.dim() != 4:
            raise ValueError("tensor keys is missing or misshapen")
        batch, window, dim = keys.shape[0], keys.shape[2], self.key_codec.spec.head_dim
        heads = self.key_codec.spec.kv_heads
        exact, sinks = (batch, heads, window, dim), (batch, heads, self.sinks, dim)
        kept = {name: require_tensor(state, name, exact, keys.dtype) for name in ("keys", "values")}
        steps = require_tensor(state, "steps", (1,), torch.int64)
        kept["first_valid"] = require_tensor(state, "first_valid", (batch,), torch.int64)
        if "sink_keys" in state:
            for name in ("sink_keys", "sink_values"):
                kept[name] = require_tensor(state, name, sinks, keys.dtype)
        if "key_codes" in state:
            tokens = state["key_codes"].shape[2] if state["key_codes"].dim() == 4 else 0
            for store, codec, name in (
                (self.key_codes, self.key_codec, "key_codes"),
                (self.value_codes, self.value_codec, "value_codes"),
            ):
                shape = (batch, codec.code_rows, tokens, codec.code_bytes)
                store.append(require_tensor(state, name, shape, torch.uint8))
            self.exact_start = tokens
        elif "sink_keys" in state:
            raise ValueError("tensor key_codes is missing")
        self.lazy_initialization(keys.to(model_dtype), keys.to(model_dtype))
        self.dtype = keys.dtype
        for name, tensor in kept.items():
            setattr(self, name, tensor)
        self.steps = int(steps)
        self.begin_rows(kept["first_valid"], self.get_seq_length())

    @property
    def nbytes(self) -> int:
        """Bytes stored for this layer's context: codes, window and sinks."""
        found = self.key_codes.nbytes + self.value_codes.nbytes
        for name in ("keys", "values", "sink_keys", "sink_values"):
            own = getattr(self, name)
            window, room = self._rooms.get(name, (None, None))
            held = room if own is not None and window is own else own
            found += 0 if held is None else held.nbytes
        return found
