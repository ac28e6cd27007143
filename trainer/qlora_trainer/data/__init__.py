"""From files to batches: readers, records, chat template, masks, tokenization, dataset, packing, collate, in order.

A reader knows a container (JSONL), a record kind knows what fields mean (a chat): neither knows the other.
"""
