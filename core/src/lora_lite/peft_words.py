"""What Hugging Face PEFT calls things, and how one says them here."""

_TARGETS = "Write targets= with a regular expression, such as targets=r'(q|v)_proj$'"
_RECIPE = (
    "To train other layers beside the adapter, give a recipe: "
    "attach(model, {r'q_proj$': 'lora', r'score$': 'full'})"
)
_OVERRIDES = "Write overrides={regular expression: {field: value}}"

OUR_WAY = {
    "target_modules": f"{_TARGETS}; for every linear layer, leave it out.",
    "target_parameters": f"{_TARGETS}.",
    "exclude_modules": "Write exclude= with a regular expression.",
    "layers_to_transform": "Write layers= with the indices of the repeated blocks.",
    "layers_pattern": "Write layers= with the indices of the repeated blocks.",
    "modules_to_save": f"{_RECIPE}.",
    "trainable_token_indices": f"{_RECIPE}.",
    "bias": f"A bias stays as it is. {_RECIPE}.",
    "rank_pattern": f"{_OVERRIDES}, such as overrides={{'down_proj': {{'r': 32}}}}.",
    "alpha_pattern": f"{_OVERRIDES}, such as overrides={{'down_proj': {{'alpha': 32.0}}}}.",
    "lora_alpha": "Write alpha=.",
    "lora_dropout": "Write dropout=.",
    "use_rslora": "Write rslora=True.",
    "use_dora": "Use the variant 'dora'.",
    "init_lora_weights": "Another start is another variant here: 'pissa', 'eva', …",
    "task_type": "Leave it out: adapters here do not depend on the task.",
    "peft_type": "Leave it out: the variant's name says it.",
    "peft_config": "Give the variant's fields themselves, such as r=8.",
    "inference_mode": "Leave it out: call model.eval(), and requires_grad_(False) if need be.",
    "adapter_name": "Write name=.",
    "autocast_adapter_dtype": "Write dtype=: the adapter is in float32 unless it says otherwise.",
}
