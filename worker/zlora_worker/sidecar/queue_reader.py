"""Read the messages of a queue in place: nothing is taken, moved or changed."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from zlora.broker.keys import waiting_lists
from zlora.broker.message import MAX_MESSAGE_BYTES, QueuedMessage, UnackedMessage

_WINDOW: Final = 100  # messages per read
_BUDGET: Final = 8 * MAX_MESSAGE_BYTES  # bytes of one look at the next jobs

# Messages between two places of each list, the last first, each as '' if it has too many bytes or
# does not fit into the budget. Ten at once, so that large messages do not fill Redis's memory.
_READ: Final = """
local lists, left = {}, tonumber(ARGV[4])
for _, list in ipairs(KEYS) do
  local found, first, last = {}, tonumber(ARGV[1]), tonumber(ARGV[2])
  if last >= 0 then last = math.min(last, redis.call('LLEN', list) - 1) end
  while last >= first do
    local items = redis.call('LRANGE', list, math.max(first, last - 9), last)
    for place = #items, 1, -1 do
      local size = #items[place]
      if size > tonumber(ARGV[3]) or size > left then
        found[#found + 1] = ''
      else
        found[#found + 1] = items[place]
        left = left - size
      end
    end
    last = last - 10
  end
  lists[#lists + 1] = found
end
return lists
"""


class QueueReader:
    """The messages of one queue. Messages above `MAX_MESSAGE_BYTES` are skipped unread.

    Each method raises `redis.RedisError` if Redis does not answer.
    """

    def __init__(self, client: Any, queue: str) -> None:
        self._redis, self._lists = client, waiting_lists(queue)
        self._read = client.register_script(_READ)

    def next_in_line(
        self, depth: int, lists: Sequence[str], *, client: Any = None
    ) -> dict[str, list[QueuedMessage]]:
        """Return the next `depth` messages of each of these lists; read at most 8 MiB in all.

        Reads by another `client`, if one is given.
        """
        arguments = [-depth, -1, MAX_MESSAGE_BYTES, _BUDGET]
        found = self._read(keys=lists, args=arguments, client=client)
        return dict(zip(lists, map(_parsed, found), strict=True))

    def windows(self) -> Iterator[list[QueuedMessage]]:
        """Return all waiting messages in parts, each part by one read."""
        everything = _WINDOW * MAX_MESSAGE_BYTES
        for name in self._lists:
            start = 0
            while items := self._read(
                keys=[name], args=[start, start + _WINDOW - 1, MAX_MESSAGE_BYTES, everything]
            )[0]:
                yield _parsed(items)
                start += _WINDOW

    def unacked(self) -> Iterator[UnackedMessage]:
        """Return the messages that workers have taken, those of all queues of the database."""
        for _, item in self._redis.hscan_iter("unacked", count=_WINDOW):
            if (message := UnackedMessage.parse(item)) is not None:
                yield message


def _parsed(items: list[str]) -> list[QueuedMessage]:
    return list(filter(None, map(QueuedMessage.parse, items)))
