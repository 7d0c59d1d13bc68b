"""A different adapter for every request of transformers' continuous batching: `model.generate_batch(prompts)`.

Requests come and go, a long prompt is taken in pieces, and one forward sees the tokens of all that are scheduled as one
row. Whose tokens they are, the manager of the batch knows: `adapter_ids` notes which id each request was given, and
tells the layers before every forward.
"""

import contextlib
import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinylora.adapters import PackedRows
from tinylora.nn import rows
from tinylora.nn.model import shared_of


@contextlib.contextmanager
def adapter_ids(model: nn.Module, ids: Tensor | Sequence[int], name: str = "default") -> Iterator[nn.Module]:
    """`with tinylora.adapter_ids(model, ids):` sequence b of a batch uses adapter ids[b] of the stack, -1 the base.

    ids: [B] integers, one per sequence: per prompt in generate() (its beams and samples follow, wherever padding
    stands) and per prompt in transformers' generate_batch(). They are read where the layers run; a captured CUDA
    graph sees changes made to the tensor in place.

    In generate_batch() no request shares another's cache of a common prefix, for keys and values depend on the
    adapter; its batches are prepared one after the other and neither captured nor compiled, because the ids of a
    packed batch are made anew for each. No manager outlives the context: requests that it finds running fail.

    One thread or task at a time: the one that runs the model (a streamer's thread enters the context itself). What is
    checkpointed with reentry must run its backward within.

    ValueError: no stack, an adapter that is not active, ids out of range, a merged model, dropout while training,
    experts or layers that take tokens first, another thread or task within one or running the model; in the forward, a
    layer that sees packed or flattened rows, which do not say whose they are, or a second batch behind the first
    (guidance); `merge` and `activate` within; in generate(), a number of
    prompts that is no multiple of the ids', audios that end at different times; in generate_batch(), another number of
    prompts than ids, a persistent manager, tensor parallelism, or a config that asks for asynchronous batching, CUDA
    graphs or compilation.
    """
    with rows.adapter_ids(model, ids, name):
        if not hasattr(type(model), "init_continuous_batching"):
            yield model
            return
        requests = _Requests(model, shared_of(model, name))
        try:
            yield model
        finally:
            requests.close()


class _Requests:
    """The managers that a model makes within one `adapter_ids`, and which of the ids each of their requests uses."""

    def __init__(self, model: nn.Module, shared):
        self.model, self.shared, self.rows = model, shared, shared.rows
        self.managers: list[tuple[Any, dict[str, int]]] = []  # each with {request: its place in ids}
        self.packed: PackedRows | None = None  # of the forward that runs
        self.error: Exception | None = None  # of the thread that generates, where nobody would see it
        self.hooks = (
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        )
        own = {"init_continuous_batching": self._manager, "generate_batch": self._generate_batch}
        own |= {"generate": self._generate, "_expand_inputs_for_generation": self._expand}
        if hasattr(type(model), "_maybe_reduce_batch"):  # Whisper's
            own |= {"_maybe_reduce_batch": self._reduce, "generate_with_fallback": self._fall_back}
        self.before = {name: model.__dict__.get(name) for name in own}
        model.__dict__.update(own)

    def close(self) -> None:
        for manager, _ in self.managers:
            if manager.is_running():
                manager.stop(block=True, hard_stop=True)
        if any(getattr(self.model, "_cached_continuous_batching_manager", None) is m for m, _ in self.managers):
            self.model.destroy_cached_continuous_batching_manager()
        for hook in self.hooks:
            hook.remove()
        for name, method in self.before.items():
            if method is None:
                del self.model.__dict__[name]
            else:
                self.model.__dict__[name] = method

    # --- what stands in the place of the model's and the manager's own methods

    def _within(self) -> bool:
        """Not so in a copy that was made within: it has these methods, and no rows."""
        return self.shared.rows is not None

    def _generate(self, *args, **kwargs):
        method, before = self.before["generate"] or type(self.model).generate.__get__(self.model), self.rows.each
        self.rows.each = None
        if self._within():  # some models' own towers run before their forward
            tokens = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            rows.look_at_images(self.rows, self.model, tokens, kwargs)
        try:
            return method(*args, **kwargs)
        finally:
            self.rows.each, self.rows.images = before, None

    def _expand(self, *args, **kwargs):
        name = "_expand_inputs_for_generation"
        own = self.before[name] or inspect.getattr_static(type(self.model), name).__get__(self.model, type(self.model))
        given = kwargs.get("input_ids", args[2] if len(args) > 2 else None)
        count = len(self.rows.ids)
        if self._within() and given is not None and given.shape[0] % count:
            raise ValueError(
                f"generate() has {given.shape[0]} prompts, expected as many as adapter_ids, {count}, or a multiple"
            )
        found = own(*args, **kwargs)
        if self._within() and found[0] is not None:
            self.rows.each = found[0].shape[0] // count  # with what the caller, or Whisper, has repeated before
        return found

    def _reduce(self, **kwargs):
        """Whisper takes an audio that is done out of the batch: the others are then not where their ids are."""
        found = type(self.model)._maybe_reduce_batch(**kwargs)
        if self._several() and 0 < found[1] < kwargs["cur_bsz"]:
            raise ValueError(
                "an audio ends before the others and leaves the batch, expected one audio at a time within "
                "adapter_ids, or one id alone for all of them"
            )
        return found

    def _fall_back(self, *args, **kwargs):
        if self._several() and len(kwargs["temperatures"]) > 1:
            raise ValueError(
                f"temperature is {kwargs['temperatures']}, expected one number: what is generated again at the next is "
                "not where its id is"
            )
        return type(self.model).generate_with_fallback(self.model, *args, **kwargs)

    def _several(self) -> bool:
        return self._within() and len(self.rows.ids) > 1

    def _generate_batch(self, *args, **kwargs):
        original = type(self.model).generate_batch
        if not self._within():
            return original(self.model, *args, **kwargs)
        asked = inspect.signature(original).bind(self.model, *args, **kwargs).arguments
        self._check_count(len(asked["inputs"]))  # here, because generate_batch only logs what goes wrong later
        if asked.get("persistent_manager"):
            raise ValueError("persistent_manager is True, expected False: adapter_ids ends, and what it keeps with it")
        found = original(self.model, *args, **kwargs)
        if self.error is not None:
            raise self.error
        return found

    def _manager(self, generation_config=None, continuous_batching_config=None, **kwargs):
        if not self._within():
            own = type(self.model).init_continuous_batching
            return own(self.model, generation_config, continuous_batching_config, **kwargs)
        try:
            from transformers import ContinuousBatchingConfig
        except ImportError:
            raise ImportError(
                "generate_batch within adapter_ids needs a newer transformers (tried with 5.23)"
            ) from None
        if getattr(self.model, "_cached_continuous_batching_manager", None) is not None:
            raise ValueError(
                "the model has a persistent manager, whose cache may hold other adapters' keys and values: "
                "model.destroy_cached_continuous_batching_manager() first"
            )
        settings = generation_config or self.model.generation_config
        config = continuous_batching_config or getattr(settings, "continuous_batching_config", None)
        config = copy.copy(config or ContinuousBatchingConfig())
        for asked in ("use_async_batching", "use_cuda_graph"):
            value = getattr(config, asked)
            if any(value) if isinstance(value, tuple) else value:
                raise ValueError(f"{asked} is {value}, expected None or False with adapter_ids")
            setattr(config, asked, False)
        config.allow_block_sharing = False  # a prefix's keys and values depend on the adapter
        original = type(self.model).init_continuous_batching
        manager = original(self.model, generation_config, config, **kwargs)
        for asked in ("varlen_compile_config", "decode_compile_config"):
            if getattr(manager.continuous_batching_config, asked) is not None:
                raise ValueError(f"{asked} is set, expected None with adapter_ids")
        if manager.distributed_helper.tp_size > 1:
            raise ValueError(f"the model is spread over {manager.distributed_helper.tp_size} devices, expected one")
        places: dict[str, int] = {}
        given: dict[int, int] = {}

        def add_requests(inputs, *args, **kwargs):
            self._check_count(len(inputs))
            inputs = [list(prompt) for prompt in inputs]  # a tensor each time another, so that `is` tells them apart
            given.update({id(prompt): place for place, prompt in enumerate(inputs)})
            try:
                return type(manager).add_requests(manager, inputs, *args, **kwargs)
            finally:
                given.clear()

        def add_request(input_ids, request_id=None, *args, **kwargs):
            if id(input_ids) not in given:
                raise ValueError(
                    "add_request does not say which of adapter_ids a request uses, expected add_requests or "
                    f"generate_batch with {len(self.rows.ids)} prompts"
                )
            places[request_id] = given[id(input_ids)]  # before the thread that generates can see the request
            return type(manager).add_request(manager, input_ids, request_id, *args, **kwargs)

        manager.add_requests, manager.add_request = add_requests, add_request
        self.managers.append((manager, places))
        return manager

    def _check_count(self, prompts: int) -> None:
        if prompts != len(self.rows.ids):
            raise ValueError(f"there are {prompts} prompts, expected one for each of {len(self.rows.ids)} adapter_ids")

    # --- around every forward

    def _enter(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        # Within another `adapter_ids`, one inside this one, the rows are the other's.
        if "cu_seq_lens_q" in kwargs and "cache" in kwargs and self.shared.rows is self.rows:
            try:
                self.shared.rows = self.packed = PackedRows(self._of_tokens(kwargs))
            except Exception as error:
                self.error = error
                raise

    def _leave(self, *_) -> None:
        if self.packed is not None and self.shared.rows is self.packed:
            self.shared.rows, self.packed = self.rows, None

    def _of_tokens(self, kwargs: Mapping[str, Any]) -> Tensor:
        """The id of every token of a packed batch, [tokens]."""
        for manager, noted in self.managers:
            if manager.batch_processor is not None and manager.batch_processor.cache is kwargs["cache"]:
                places, batch = noted, manager.batch_processor.inputs_and_outputs.requests_in_batch
                break
        else:
            raise ValueError("a batch of a manager from outside of adapter_ids: expected one that was made within")
        lengths = [request.query_length for request in batch]
        ends = list(itertools.accumulate(lengths, initial=0))
        if kwargs["cu_seq_lens_q"].tolist() != ends or kwargs["input_ids"].shape != (1, ends[-1]):
            raise ValueError(
                f"the batch has sequences that end at {kwargs['cu_seq_lens_q'].tolist()[:8]}, expected the scheduled "
                f"requests' ends, {ends[:8]}: this version of transformers packs them in another way"
            )
        # Of a prompt with several return sequences each is a child of the request, forked after the prompt.
        own = [places[request.state.request_id.split("__child#")[0]] for request in batch]
        ids = self.rows.ids
        index = torch.tensor(own, device=ids.device), torch.tensor(lengths, device=ids.device)
        return ids[index[0]].repeat_interleave(index[1])
