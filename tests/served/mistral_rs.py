"""mistral.rs, in a process of its own: the log-probabilities of the next token, as JSON.

    python mistral_rs.py BASE FOLDER PROMPT [PROMPT ...]

Of the base, of the adapter, and of the base again, for each prompt: the twenty most likely tokens,
as {token: log-probability}.
"""

import json
import sys

from mistralrs import Architecture, ChatCompletionRequest, LoraAdapter, ModelDType, Runner, Which

base, folder, *prompts = sys.argv[1:]
runner = Runner(
    Which.Lora(
        base, adapters=[LoraAdapter("ours", folder)], arch=Architecture.Llama, dtype=ModelDType.F32
    ),
    jinja_explicit=f"{base}/as_it_is.jinja",
    token_source="none",
    prefix_cache_n=0,
)


def most_likely(prompt: str, adapter: str | None) -> dict[str, float]:
    answer = runner.send_chat_completion_request(
        ChatCompletionRequest(
            [{"role": "user", "content": prompt}],
            model="default",
            logprobs=True,
            top_logprobs=20,
            max_tokens=1,
            temperature=0.0,
            adapter=adapter,
        )
    )
    first = answer.choices[0].logprobs.content[0]
    return {str(each.token): each.logprob for each in first.top_logprobs}


rounds = [[most_likely(prompt, adapter) for prompt in prompts] for adapter in (None, "ours", None)]
print(json.dumps(rounds))
