"""What the task files beside this one call."""

import random
import signal
import zlib

from spin.runtime.signals import Interrupted


def reversed_order(docs):
    return docs.select(range(len(docs) - 1, -1, -1))


def logp_of_the_true_choice(doc, results):
    return {"logp": results[doc["answer"]][0]}


def short_of_memory(doc, results):
    raise MemoryError


def stopped(doc, results):
    random.random()
    raise Interrupted(signal.SIGTERM)


def logp_of_the_text(doc, results):
    return {"logp": results[0]}


def checksum(doc, results):
    return {"crc": zlib.crc32(results[0].encode())}
