"""The requests on a simulated instance, and how many KV blocks they hold."""

from sagec.runtime.engines.sim.row import Row
from sagec.runtime.request import Request


class Residents:
    """Rows by request id. Blocks are counted, not named."""

    def __init__(self, kv_blocks: int, block_tokens: int) -> None:
        self.kv_blocks, self.block_tokens = kv_blocks, block_tokens
        self.room_tokens = kv_blocks * block_tokens
        self.rows: dict[str, Row] = {}
        self.used_blocks = 0

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)

    def add(self, request: Request, output_tokens: int = 0) -> Row:
        """A row for `request` without KV; what was here of it is forgotten."""
        if request.id in self.rows:
            self.drop(request.id)
        prompt = len(request.prompt)
        limit = self.room_tokens
        if request.max_output_tokens is not None:
            limit = prompt + request.max_output_tokens
        row = self.rows[request.id] = Row(request, prompt + output_tokens, limit)
        return row

    def drop(self, request_id: str) -> None:
        """Forget a request and free its blocks."""
        if row := self.rows.pop(request_id, None):
            self.hold(row, 0)

    def hold(self, row: Row, blocks: int) -> None:
        """Have the row hold exactly so many blocks."""
        self.used_blocks += blocks - row.blocks
        row.blocks = blocks

    def make_room(self, row: Row, tokens: int, reserved: int = 0) -> bool:
        """Have blocks for the row's first `tokens` tokens, and those reserved for it where there
        are; false where there are too few."""
        needed = self.blocks_for(tokens)
        if row.blocks >= max(needed, 1):
            return True
        free = self.kv_blocks - self.used_blocks
        if needed - row.blocks > free:
            return False
        self.hold(row, max(needed, min(reserved, row.blocks + free)))
        row.swapped = False
        return True

    def keep_only(self, reserved: dict[str, int]) -> None:
        """Take back blocks that hold no KV and that the new plan does not reserve."""
        for request_id, row in self.rows.items():
            filled = 0 if row.swapped else self.blocks_for(row.computed)
            self.hold(row, max(filled, min(row.blocks, reserved.get(request_id, 0))))

    def check_integrity(self) -> None:
        """Raise AssertionError unless the blocks that are held are those of the rows."""
        held = sum(row.blocks for row in self.rows.values())
        if held != self.used_blocks or held > self.kv_blocks:
            raise AssertionError(f"{self.used_blocks} of {self.kv_blocks} blocks, rows hold {held}")


def exceeds(residents: Residents, request: Request) -> str:
    """Why the instance can never hold the request's prompt; "" where it can."""
    if len(request.prompt) < residents.room_tokens:
        return ""
    return (
        f"a prompt of {len(request.prompt)} tokens leaves no room for an answer in "
        f"{residents.room_tokens} tokens of context"
    )
