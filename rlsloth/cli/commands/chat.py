"""``rlsloth chat``: a conversation with a trained model, its answers streamed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlsloth.cli.flags import with_first_word
from rlsloth.cli.read_config import read_config
from rlsloth.config import EnvConfig
from rlsloth.config.export import ChatConfig
from rlsloth.errors import UserError
from rlsloth.records import Message, Prompt

if TYPE_CHECKING:
    from rlsloth.training.source import Source


def run(name: str, argv: list[str]) -> int:
    """Talk. Returns the exit status."""
    words = with_first_word(argv, "--source")
    run_chat(read_config(ChatConfig, words, f"rlsloth {name} SOURCE"))
    return 0


class Talker:
    """A model that answers."""

    def __init__(self, source: Source, cfg: ChatConfig) -> None:
        """Load it. Raises UserError."""
        from rlsloth.data.renderer import Renderer
        from rlsloth.policy.attention.interface import whole_attention
        from rlsloth.policy.load import load_model
        from rlsloth.policy.lora import load_adapter
        from rlsloth.training.source import prompting

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
        asked_of = prompting(source.config)
        kwargs = asked_of.get("chat_template_kwargs") or {}
        ends = loaded.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self._renderer = Renderer(
            self.tokenizer, EnvConfig(chat_template_kwargs=kwargs), eos_token_ids=ends
        )
        self.context = int(loaded.model.config.get_text_config().max_position_embeddings)
        asked = cfg.system_prompt
        self.system_prompt: str | None = asked_of.get("system_prompt") if asked is None else asked

    @property
    def chats(self) -> bool:
        """Whether it has a chat template; else it continues text."""
        return bool(self.tokenizer.chat_template)

    def opening(self) -> list[Message]:
        """What a conversation begins with."""
        if not self.system_prompt:
            return []
        return [{"role": "system", "content": self.system_prompt}]

    def answer(self, said: Sequence[Message] | str) -> str:
        """Print the model's answer as it comes; without a final newline of its own.

        Args:
            said: the conversation, ending with the user, or text to continue.

        Raises:
            UserError: it leaves no room in the model's context.
        """
        import torch

        messages = said if isinstance(said, str) else tuple(said)
        prompt = self._renderer.prompt_ids(Prompt(0, messages, {}))
        room = self.context - len(prompt)
        if room < 1:
            raise UserError(
                f"{len(prompt)} tokens leave no room in the model's context of {self.context}"
            )
        ids = torch.tensor([prompt], device=self._model.device)
        streamer = _streamer(self.tokenizer)
        try:
            with torch.no_grad():
                self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self._generation(min(room, self._cfg.max_tokens)),
                    streamer=streamer,
                )
        except KeyboardInterrupt:  # ends the answer, not the conversation
            streamer.end()
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
        """Prints an answer and keeps it."""

        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            print(text, end="\n" if stream_end else "", flush=True)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def run_chat(cfg: ChatConfig) -> None:
    """Answer ``cfg.prompt``, or talk until the end of input.

    Raises:
        UserError: nothing there to talk to, or a prompt that is too long.
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
            print(f"{error}; the conversation starts anew", file=sys.stderr)
            conversation = talker.opening()
            continue
        conversation.append({"role": "assistant", "content": answer})
