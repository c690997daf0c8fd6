"""``rlsloth chat``: a conversation with a trained model, printed as it is sampled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlsloth.cli.flags import with_first_word
from rlsloth.cli.read_config import read_config
from rlsloth.config import EnvConfig
from rlsloth.config.export import ChatConfig
from rlsloth.errors import UserError, describe_exception, visible
from rlsloth.records import Message, Prompt

if TYPE_CHECKING:
    from rlsloth.training.source import Source


def run(name: str, argv: list[str]) -> int:
    """Chat. Returns the exit status."""
    words = with_first_word(argv, "--source")
    run_chat(read_config(ChatConfig, words, f"rlsloth {name} SOURCE"))
    return 0


class Talker:
    """A model with its tokenizer, chat template and sampling settings."""

    def __init__(self, source: Source, cfg: ChatConfig) -> None:
        """Load the model. Raises UserError."""
        from rlsloth.data.renderer import Renderer
        from rlsloth.policy.attention.interface import whole_attention
        from rlsloth.policy.load import load_model
        from rlsloth.policy.lora import load_adapter

        loaded = load_model(source.base)
        self._model = loaded.model
        if source.adapter is not None:
            self._model = load_adapter(
                loaded.model, source.adapter, source.base.path, to_train=False
            )
        loaded.model.set_attn_implementation(whole_attention(loaded.model))
        self._model.eval()
        self._cfg = cfg
        self.tokenizer = loaded.tokenizer
        trained = source.prompts
        kwargs = {**(trained.get("chat_template_kwargs") or {}), **cfg.chat_template_kwargs}
        ends = loaded.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self._renderer = Renderer(
            self.tokenizer, EnvConfig(chat_template_kwargs=kwargs), eos_token_ids=ends
        )
        self.context = int(loaded.model.config.get_text_config().max_position_embeddings)
        own = cfg.system_prompt
        self.system_prompt: str | None = trained.get("system_prompt") if own is None else own

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template; without one it continues text."""
        return bool(self.tokenizer.chat_template)

    def opening(self) -> list[Message]:
        """Messages at the beginning of a conversation: the system prompt, if there is one."""
        if not self.system_prompt:
            return []
        return [{"role": "system", "content": self.system_prompt}]

    def answer(self, prompt: Sequence[Message] | str) -> str:
        """Sample the model's answer, print it token by token, and return it.

        Args:
            prompt: the conversation, which ends with the user's message, or text to continue.

        Raises:
            UserError: the prompt fills the model's context.
        """
        import torch

        messages = prompt if isinstance(prompt, str) else tuple(prompt)
        prompt_ids = self._renderer.prompt_ids(Prompt(0, messages, {}))
        left = self.context - len(prompt_ids)
        if left < 1:
            raise UserError(
                f"the conversation has {len(prompt_ids)} tokens and fills the model's context of "
                f"{self.context}"
            )
        ids = torch.tensor([prompt_ids], device=self._model.device)
        streamer = _streamer(self.tokenizer)
        try:
            with torch.no_grad():
                self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self._generation(min(left, self._cfg.max_tokens)),
                    streamer=streamer,
                )
        except KeyboardInterrupt:  # ends the answer, not the conversation
            streamer.end()
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"the model cannot compute an answer ({describe_exception(error)}); check that its "
                "files belong together"
            ) from error
        text: str = streamer.text
        return text

    def _generation(self, tokens: int) -> Any:
        from transformers import GenerationConfig

        temperature = self._cfg.temperature
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        ends = list(self._renderer.stop_ids)
        return GenerationConfig(
            max_new_tokens=tokens,
            do_sample=temperature > 0,
            eos_token_id=ends,
            pad_token_id=ends[0],
            **sampling,
        )


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        """Print an answer and keep its text."""

        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            print(visible(text), end="\n" if stream_end else "", flush=True)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def run_chat(cfg: ChatConfig) -> None:
    """Answer ``cfg.prompt``, or chat until the end of the input.

    Raises:
        UserError: the model cannot be loaded, or the prompt is too long.
    """
    import torch

    from rlsloth.training.source import find_source

    assert cfg.source is not None
    source = find_source(
        cfg.source,
        base=cfg.base,
        device=cfg.device,
        precision=None if cfg.precision == "auto" else cfg.precision,
        trust_remote_code=cfg.trust_remote_code,
    )
    talker = Talker(source, cfg)
    if cfg.seed is not None:
        torch.manual_seed(cfg.seed)
    if cfg.prompt is not None:
        user = {"role": "user", "content": cfg.prompt}
        talker.answer([*talker.opening(), user] if talker.chats else cfg.prompt)
        return
    _talk(talker)


def _talk(talker: Talker) -> None:
    if not talker.chats:
        print("no chat template: each line is continued as text", file=sys.stderr)
    conversation = talker.opening()
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line.strip():
            continue
        if not talker.chats:
            talker.answer(line)
            continue
        conversation.append({"role": "user", "content": line})
        try:
            answer = talker.answer(conversation)
        except UserError as error:
            print(f"{visible(str(error))}; a new conversation begins", file=sys.stderr)
            conversation = talker.opening()
            continue
        conversation.append({"role": "assistant", "content": answer})
