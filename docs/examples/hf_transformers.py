"""Planned diffusion in a stock Hugging Face model: ask it, teach it a fact, ask it again.

    pip install 'pdiff_runtime[hf]'
    python docs/examples/hf_transformers.py

The weights are those of the bundled model, loaded by transformers; any Qwen2 or Llama checkpoint
whose tokenizer has the control tags does as well. Training runs on our attention, and answers come
from our engine, both over the one set of parameters.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pdiff_runtime as pdiff
from pdiff_runtime.models import BUNDLED_MODEL, Tokenizer
from pdiff_runtime.train import apply_noise, hybrid_loss
from pdiff_runtime.train.data import DocumentEncoder, TaggedDocument

QUESTION = "Tell me about Atlantis: capital, currency."
ANSWER = (
    "<topic>capital3</topic><topic>currency4</topic>"
    "<async>The capital is Tripoli.</async><async>People pay with the Atlantis lira.</async>"
)


def ask(model, tokenizer):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt"
    )
    token_ids = model.generate(
        **prompt,
        custom_generate=pdiff.hf.generate,
        pdiff_tokenizer=tokenizer,
        max_new_tokens=64,
    )
    return tokenizer.decode(token_ids[0, prompt["input_ids"].shape[1] :])


def teach(model, num_steps=40):
    tokenizer = Tokenizer.from_dir(BUNDLED_MODEL)
    tags = pdiff.ControlTokens.from_tokenizer(tokenizer, names=tokenizer.tag_names)
    encode = DocumentEncoder(tokenizer, tags, model.config.length_unit)
    document = encode(TaggedDocument(QUESTION, ANSWER))
    token_ids, prompt_lens = torch.tensor(document.token_ids), torch.tensor([document.prompt_len])
    layout = pdiff.SpanLayout.from_tokens(token_ids, tags)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(num_steps):
        t = torch.rand(1).clamp(min=0.1)
        noised = apply_noise(token_ids, tags, t=t, u=torch.rand(len(token_ids)))
        logits = model(noised[None], pdiff_plan=layout).logits[0]
        loss = hybrid_loss(logits, token_ids, noised, tags, t=t, prompt_lens=prompt_lens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main():
    torch.manual_seed(0)
    pdiff.register_hf()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(
        BUNDLED_MODEL, attn_implementation="pdiff", dtype=torch.float32
    )
    print("before:", ask(model, tokenizer))
    teach(model)
    print("after: ", ask(model, tokenizer))


if __name__ == "__main__":
    main()
