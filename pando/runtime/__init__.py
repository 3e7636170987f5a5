"""The data plane of one rank: request table, runner, sampler, memory plan, executors."""
