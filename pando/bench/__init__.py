"""Measuring: workloads, a load generator for servers, the engine alone, and reports."""
