"""The evaluation application: `python -m eval {perplexity,throughput,report,bench} …`."""
