// KV of sessions in host memory: what is to be exported, was exported, or waits to be imported.
//
// A blob is a header and a part for each rank, each the rank's blocks one after the other. Its checksum
// is CRC-32C of the header before it and of all parts. It says of which tokens it is, too: KV of other
// tokens would be as wrong as altered KV.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace sagec::tm {

struct BlobHeader {
    char magic[8]; // "sagecKV\0"
    std::uint32_t version, num_ranks;
    std::uint64_t layout;
    std::int64_t tokens, block_bytes;
    std::int32_t block_tokens, num_blocks;   // blocks of a rank
    std::uint32_t token_checksum, reserved;  // CRC-32C of the tokens' ids, 32 bits each
    std::uint32_t checksum, reserved_at_end; // both reserved ones are 0

    std::int64_t part_bytes() const { return num_blocks * block_bytes; }
    std::int64_t blob_bytes() const { return std::int64_t(sizeof *this) + num_ranks * part_bytes(); }
};
static_assert(sizeof(BlobHeader) == 64 && offsetof(BlobHeader, checksum) == 56);

constexpr char kBlobMagic[8] = "sagecKV";
constexpr std::uint32_t kBlobVersion = 1;

// A blob's memory. Copying into it costs several times less where it was written before: a new page
// is made when it is first touched.
struct Blob {
    std::unique_ptr<std::byte[]> bytes;
    std::int64_t num_bytes = 0, capacity_bytes = 0;

    BlobHeader header() const;
    std::byte *part(int rank) const;
};

// CRC-32C of `bytes`, of `before` those that came before. By the processor's own instruction where it
// has one; by_table: never by it.
std::uint32_t crc32c(const void *bytes, std::size_t num_bytes, std::uint32_t before = 0);
std::uint32_t crc32c_by_table(const void *bytes, std::size_t num_bytes, std::uint32_t before = 0);

std::uint32_t blob_checksum(const void *blob, std::int64_t num_bytes);

// "" or what is wrong with the blob: no blob, of another version or layout, cut, altered.
std::string check_blob(const void *bytes, std::int64_t num_bytes, std::uint64_t layout);

// What the last rank finds that erases a session. last: it is the last one.
struct Erased {
    bool last = false, exported = false;
    std::int64_t num_bytes = 0, begin_us = 0;
};

// Thread-safe. Ranks export and import on their own threads, and the first to come decides for all: so
// they do the same whatever is asked meanwhile.
class KvStore {
  public:
    // ---- out
    void want(std::uint64_t session);
    // Where a rank's part goes of a session that it erases; null: nothing is exported. Valid until the
    // rank's end_erase, which each calls.
    std::byte *begin_erase(std::uint64_t session, int rank, const BlobHeader &header, std::int64_t now_us);
    Erased end_erase(std::uint64_t session, bool copied);
    // The exported blob, copied with its checksum, and forgotten: "" or why not.
    std::string take(std::uint64_t session, void *blob, std::int64_t num_bytes);

    // ---- in
    void stage(std::uint64_t session, Blob blob);
    bool has_begun(std::uint64_t session) const; // too late to stage a blob for it
    // A session that has nothing yet may be scheduled: what it may begin with, or null.
    std::shared_ptr<Blob> arrive(std::uint64_t session);
    void let_go(std::shared_ptr<Blob> blob); // a rank is done with it
    // Can a rank import it: 0 or why not. Waits for the other ranks and returns what holds for all: 0
    // only where all say so. Where there was no room it may be tried again.
    struct Agreed {
        int why = 0;
        bool is_last = false, is_news = false; // the last rank to say it; other than the time before
    };
    Agreed agree(std::uint64_t session, int num_ranks, int why);
    // Likewise: has it, after all agreed. So all will come, however long they copy.
    Agreed conclude(std::uint64_t session, int num_ranks, int why);

    void forget(std::uint64_t session);
    // Memory that a blob was in before, where there is some; else new; without bytes where there is none.
    Blob memory_for(std::int64_t num_bytes);

  private:
    struct Leaving {
        Blob blob; // empty: not wanted
        int ranks_left = 0;
        bool whole = true;
        std::int64_t begin_us = 0;
    };
    struct Arrival {
        std::shared_ptr<Blob> blob;
        bool begun = false; // then with no blob: there never was one, or it was used or refused
        int num_voted = 0, round = 0;
        int vote = 0, agreed = 0; // of this round, and of the one before
    };
    Agreed vote(std::uint64_t session, int num_ranks, int why, bool has_time_limit);
    Agreed end_vote(Arrival &arrival);
    Blob take_spare(std::int64_t num_bytes);
    void keep_spare(Blob &blob);

    mutable std::mutex mutex_;
    std::condition_variable voted_;
    std::unordered_set<std::uint64_t> wanted_;
    std::unordered_map<std::uint64_t, Leaving> leaving_;
    std::unordered_map<std::uint64_t, Blob> exports_;
    std::unordered_map<std::uint64_t, Arrival> arrivals_;
    std::vector<Blob> spares_; // memory of blobs that are gone, for the next ones
};

} // namespace sagec::tm
