// CRC-32C (Castagnoli), as SSE 4.2 has an instruction for it.
#include <nmmintrin.h>

#include <array>
#include <cstring>

#include "kv_store.h"

namespace sagec::tm {

namespace {

constexpr std::uint32_t kPolynomial = 0x82f63b78; // reflected

constexpr std::array<std::uint32_t, 256> make_table() {
    std::array<std::uint32_t, 256> table{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit)
            crc = crc & 1 ? (crc >> 1) ^ kPolynomial : crc >> 1;
        table[byte] = crc;
    }
    return table;
}

constexpr auto kTable = make_table();

// The instruction gives its result after three cycles and can begin one each cycle: so three stretches of
// memory are gone through at once, and their checksums are put together.
constexpr std::size_t kStretchBytes = 4096;

// What a checksum becomes by kStretchBytes zeros, for each value of each of its four bytes: the rest
// follows, as it is linear.
struct Skip {
    std::uint32_t of[4][256];

    Skip() {
        for (std::uint32_t place = 0; place < 4; ++place)
            for (std::uint32_t byte = 0; byte < 256; ++byte)
                of[place][byte] = byte & (byte - 1) ? of[place][byte & (byte - 1)] ^ of[place][byte & -byte]
                                                    : after_zeros(byte << 8 * place);
    }
    static std::uint32_t after_zeros(std::uint32_t crc) {
        for (std::size_t i = 0; crc && i < kStretchBytes; ++i)
            crc = (crc >> 8) ^ kTable[crc & 0xff];
        return crc;
    }
    std::uint32_t operator()(std::uint32_t crc) const {
        return of[0][crc & 0xff] ^ of[1][crc >> 8 & 0xff] ^ of[2][crc >> 16 & 0xff] ^ of[3][crc >> 24];
    }
};

std::uint64_t word_at(const unsigned char *bytes) {
    std::uint64_t word;
    std::memcpy(&word, bytes, sizeof word);
    return word;
}

__attribute__((target("sse4.2"))) std::uint32_t three_stretches(const unsigned char *bytes,
                                                                std::uint32_t crc) {
    static const Skip skip;
    std::uint64_t first = crc, second = 0, third = 0;
    for (std::size_t i = 0; i < kStretchBytes; i += 8) {
        first = _mm_crc32_u64(first, word_at(bytes + i));
        second = _mm_crc32_u64(second, word_at(bytes + kStretchBytes + i));
        third = _mm_crc32_u64(third, word_at(bytes + 2 * kStretchBytes + i));
    }
    const std::uint32_t both = skip(static_cast<std::uint32_t>(first)) ^ static_cast<std::uint32_t>(second);
    return skip(both) ^ static_cast<std::uint32_t>(third);
}

__attribute__((target("sse4.2"))) std::uint32_t by_instruction(const unsigned char *bytes,
                                                               std::size_t num_bytes, std::uint32_t crc) {
    constexpr std::size_t kThree = 3 * kStretchBytes;
    for (; num_bytes >= kThree; bytes += kThree, num_bytes -= kThree)
        crc = three_stretches(bytes, crc);
    for (; num_bytes >= 8; bytes += 8, num_bytes -= 8)
        crc = static_cast<std::uint32_t>(_mm_crc32_u64(crc, word_at(bytes)));
    for (; num_bytes; ++bytes, --num_bytes)
        crc = _mm_crc32_u8(crc, *bytes);
    return crc;
}

} // namespace

std::uint32_t crc32c_by_table(const void *bytes, std::size_t num_bytes, std::uint32_t before) {
    std::uint32_t crc = ~before;
    for (auto byte = static_cast<const unsigned char *>(bytes); num_bytes; ++byte, --num_bytes)
        crc = (crc >> 8) ^ kTable[(crc ^ *byte) & 0xff];
    return ~crc;
}

std::uint32_t crc32c(const void *bytes, std::size_t num_bytes, std::uint32_t before) {
    static const bool has_instruction = __builtin_cpu_supports("sse4.2");
    if (!has_instruction)
        return crc32c_by_table(bytes, num_bytes, before);
    return ~by_instruction(static_cast<const unsigned char *>(bytes), num_bytes, ~before);
}

} // namespace sagec::tm
