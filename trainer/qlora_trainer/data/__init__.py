"""From files to batches: readers, records, template, masks, tokenization, dataset, packing, collate, in this order.

A reader knows a container (JSONL), a record kind knows what fields mean (a chat): neither knows the other.
"""
