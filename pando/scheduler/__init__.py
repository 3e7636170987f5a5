"""The scheduler: requests, admission, the loop. Never imports torch; its tests run with a fake executor."""
