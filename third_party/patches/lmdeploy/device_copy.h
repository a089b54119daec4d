// Copying a session's blocks between a device and host memory.
//
// On streams of the calling thread, through two pieces of pinned memory, so that the device fills one
// while the other is emptied. TurboMind's stream need not be waited for: a step ends with its
// synchronisation, and between two steps nothing reads or writes a block of the KV cache.
#pragma once

#include <cstddef>
#include <vector>

namespace sagec::tm {

using DeviceBlocks = std::vector<void *>;

// `host` holds the blocks one after the other. Done when they return; false: the CUDA runtime refused.
bool copy_to_host(const DeviceBlocks &blocks, std::size_t block_bytes, std::byte *host);
bool copy_to_device(const std::byte *host, std::size_t block_bytes, const DeviceBlocks &blocks);

// Makes the calling thread's streams and pinned memory, which its first copy does otherwise. Pinned memory is
// had only when the device rests: where ranks work together it must be made while none computes, for who
// computes may wait for a rank that waits for its memory.
void prepare_copies();

} // namespace sagec::tm
