"""Family adapters: functions from a Hugging Face config to a Spec, saying only what differs."""
