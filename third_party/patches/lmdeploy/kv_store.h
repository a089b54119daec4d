// KV of sessions in host memory: what is to be exported, was exported, or waits to be imported.
//
// A blob is a header and a part for each rank, each the rank's blocks one after the other:
//   magic, version, num_ranks, layout, tokens, block_bytes, block_tokens, num_blocks, checksum
// The checksum is CRC-32C of all parts and of the header before it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace sagec::tm {

using Blob = std::vector<std::byte>;

struct BlobHeader {
    char magic[8]; // "sagecKV\0"
    std::uint32_t version, num_ranks;
    std::uint64_t layout;
    std::int64_t tokens, block_bytes;
    std::int32_t block_tokens, num_blocks; // blocks of a rank
    std::uint32_t checksum, pad;
};
static_assert(sizeof(BlobHeader) == 64);

constexpr std::uint32_t kBlobVersion = 1;

std::uint32_t crc32c(const void *bytes, std::size_t num_bytes, std::uint32_t before = 0);

// "" or what is wrong with the blob: no blob, cut, of another version, layout or block size, altered.
std::string check_blob(const void *bytes, std::int64_t num_bytes, std::uint64_t layout);

// Thread-safe. Ranks export and import on their own threads; a session's KV is whole when every rank
// has done its part.
class KvStore {
  public:
    void want(std::uint64_t session);
    bool wants(std::uint64_t session) const;

    // Space for a rank's part of a session that was wanted; valid until `exported` of the last rank.
    std::byte *begin_export(std::uint64_t session, int rank, int num_ranks, const BlobHeader &header);
    bool end_export(std::uint64_t session, int rank); // true for the last rank: the blob is whole
    bool take(std::uint64_t session, void *blob, std::int64_t num_bytes);

    void stage(std::uint64_t session, Blob blob);
    const Blob *staged(std::uint64_t session) const; // stays valid until the same session is forgotten
    void forget(std::uint64_t session);

  private:
    struct Export {
        Blob blob;
        int ranks_left = 0;
        bool whole = false;
    };
    mutable std::mutex mutex_;
    std::unordered_set<std::uint64_t> wanted_;
    std::unordered_map<std::uint64_t, Export> exports_;
    std::unordered_map<std::uint64_t, Blob> staged_;
};

} // namespace sagec::tm
