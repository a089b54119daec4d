#include "device_copy.h"

#include <algorithm>
#include <cstring>

#include "cuda_calls.h"

namespace sagec::tm {

namespace {

constexpr std::size_t kPieceBytes = 4 << 20;

// Bytes [begin, end) of a session's blocks, one after the other.
struct Piece {
    std::size_t begin = 0, end = 0;
};

// Pinned memory for a piece, and the stream on which it is copied.
struct Lane {
    void *stream = nullptr, *pinned = nullptr;
    Piece piece; // under way, or empty

    bool open() {
        return (stream || cuda().stream_create(&stream, kNonBlocking) == 0) &&
               (pinned || cuda().host_alloc(&pinned, kPieceBytes, 0) == 0);
    }
    bool wait() const { return cuda().stream_synchronize(stream) == 0; }
    std::byte *memory() const { return static_cast<std::byte *>(pinned); }
};

struct Lanes {
    Lane lanes[2];

    bool open() { return cuda().can_copy() && lanes[0].open() && lanes[1].open(); }
    Lane &of(std::size_t piece) { return lanes[piece % 2]; }
    // Where a copy was refused: nothing may reach the blocks when they are another's, and TurboMind ends the
    // process over an error that its thread was left with.
    bool give_up() {
        for (Lane &lane : lanes) {
            if (lane.stream)
                lane.wait();
            lane.piece = {};
        }
        if (const auto forget_error = cuda().get_last_error)
            forget_error();
        return false;
    }
    ~Lanes() {
        for (Lane &lane : lanes) {
            if (lane.pinned)
                cuda().host_free(lane.pinned);
            if (lane.stream)
                cuda().stream_destroy(lane.stream);
        }
    }
};

thread_local Lanes of_this_thread;

// Enqueues a piece between the lane's memory and the blocks that it lies in.
bool enqueue(const Lane &lane, Piece piece, const DeviceBlocks &blocks, std::size_t block_bytes, int kind) {
    for (std::size_t at = piece.begin; at < piece.end;) {
        const std::size_t block = at / block_bytes, offset = at % block_bytes;
        const std::size_t num_bytes = std::min(piece.end - at, block_bytes - offset);
        std::byte *device = static_cast<std::byte *>(blocks[block]) + offset;
        std::byte *host = lane.memory() + (at - piece.begin);
        const bool out = kind == kDeviceToHost;
        if (cuda().memcpy_async(out ? host : device, out ? device : host, num_bytes, kind, lane.stream) != 0)
            return false;
        at += num_bytes;
    }
    return true;
}

bool empty_into(Lane &lane, std::byte *host) {
    if (!lane.wait())
        return false;
    std::memcpy(host + lane.piece.begin, lane.memory(), lane.piece.end - lane.piece.begin);
    lane.piece = {};
    return true;
}

Piece piece_at(std::size_t index, std::size_t num_bytes) {
    return {index * kPieceBytes, std::min(num_bytes, (index + 1) * kPieceBytes)};
}

} // namespace

void prepare_copies() {
    if (!of_this_thread.open())
        of_this_thread.give_up();
}

bool copy_to_host(const DeviceBlocks &blocks, std::size_t block_bytes, std::byte *host) {
    const std::size_t num_bytes = blocks.size() * block_bytes;
    const std::size_t num_pieces = (num_bytes + kPieceBytes - 1) / kPieceBytes;
    Lanes &lanes = of_this_thread;
    if (!lanes.open())
        return lanes.give_up();
    for (std::size_t i = 0; i < num_pieces + 2; ++i) { // each lane is emptied when its turn comes again
        Lane &lane = lanes.of(i);
        if (i >= 2 && i - 2 < num_pieces && !empty_into(lane, host))
            return lanes.give_up();
        if (i >= num_pieces)
            continue;
        lane.piece = piece_at(i, num_bytes);
        if (!enqueue(lane, lane.piece, blocks, block_bytes, kDeviceToHost))
            return lanes.give_up();
    }
    return true;
}

bool copy_to_device(const std::byte *host, std::size_t block_bytes, const DeviceBlocks &blocks) {
    const std::size_t num_bytes = blocks.size() * block_bytes;
    Lanes &lanes = of_this_thread;
    if (!lanes.open())
        return lanes.give_up();
    for (std::size_t i = 0; i * kPieceBytes < num_bytes; ++i) {
        Lane &lane = lanes.of(i);
        const Piece piece = piece_at(i, num_bytes);
        if (!lane.wait())
            return lanes.give_up();
        std::memcpy(lane.memory(), host + piece.begin, piece.end - piece.begin);
        if (!enqueue(lane, piece, blocks, block_bytes, kHostToDevice))
            return lanes.give_up();
    }
    return (lanes.lanes[0].wait() && lanes.lanes[1].wait()) || lanes.give_up();
}

} // namespace sagec::tm
