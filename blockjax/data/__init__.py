"""Text to batches.

A batch is made in five steps, each a file that knows only the one before:

1. `open_corpus("stdlib", data_dir)` (`corpus`) turns a source of text (`sources`) into documents in
   three splits, kept as array_record by a TFDS builder (`text_corpus`), or reads a TFDS dataset where
   it lies (`tfds_source`).
2. `token_index(corpus, open_tokenizer("bytes"), "train", data_dir)` (`tokenizers`, `index`) tokenises
   them once into one memory-mapped array with offsets.
3. `make_order("packed", index, batch_size, seq_len, seed)` (`orders`) says which tokens row b of batch
   k holds, from (seed, k) alone: prefix sums over a seeded permutation, no state, no process count.
4. `order.batch(k, rows)` lays tokens, targets, segment ids and positions into numpy rows.
5. `Loader(order, sharding, start=k)` (`loader`) reads ahead and puts each row on the devices that want it.
"""

from blockjax.data.corpus import Corpus, open_corpus
from blockjax.data.index import TokenIndex, token_index
from blockjax.data.loader import Loader
from blockjax.data.orders import EVALUATIONS, Evaluation, Order, make_order
from blockjax.data.tokenizers import Tokenizer, open_tokenizer

__all__ = [
    "EVALUATIONS",
    "Corpus",
    "Evaluation",
    "Loader",
    "Order",
    "TokenIndex",
    "Tokenizer",
    "make_order",
    "open_corpus",
    "open_tokenizer",
    "token_index",
]
