"""What a user's own process does with the port: load it in vLLM and generate, with no portkit.

Run as a plain script in a fresh interpreter (never imported): it must find the architecture by
itself, through vLLM's registry or through the plugin's entry point.

usage: fresh_engine.py REQUEST.json    (prints one line "RESULT {json}" at the end)
"""

import json
import sys

from served_class import class_and_file  # beside this script


def main() -> None:
    with open(sys.argv[1]) as stream:
        request = json.load(stream)
    import vllm

    llm = vllm.LLM(request["checkpoint"], skip_tokenizer_init=True, **request["options"])
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True
    )
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in request["prompts"]], sampling, use_tqdm=False
    )
    module, name, file = llm.apply_model(class_and_file)[0]
    answer = {
        "model_class": [module, name],
        "model_file": file,
        "portkit_imported": "portkit" in sys.modules,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    }
    print("RESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
