// What the toy model looks into of TurboMind (lmdeploy 0.11.0), beyond what the patches do; and the
// functions whose place it takes. Offsets and names were read from the wheels' debug information.
#pragma once

#include "abi.h"

namespace sagec::tm::toy {

// turbomind::Communicators, as far as it is looked at. device is null where there is one rank.
struct Communicators {
    std::byte unused[48];
    void *device;
};
static_assert(offsetof(Communicators, device) == 48);

// turbomind::LlamaV2: the model of one rank.
struct Model {
    std::byte unused0[68];
    int quantised_bits; // of KV; 0: not quantised
    std::byte unused1[100];
    int block_tokens;
    std::byte unused2[152];
    const Communicators *communicators;
    int num_ranks, rank;
    std::byte unused3[8];
    std::size_t head_dim, unused4, num_layers, vocab_size;
    std::byte unused5[24];
    std::size_t local_kv_heads;
    std::byte unused6[16];
    void *stream;
};
static_assert(offsetof(Model, quantised_bits) == 68 && offsetof(Model, block_tokens) == 172);
static_assert(offsetof(Model, communicators) == 328 && offsetof(Model, rank) == 340);
static_assert(offsetof(Model, head_dim) == 352 && offsetof(Model, vocab_size) == 376);
static_assert(offsetof(Model, local_kv_heads) == 408 && offsetof(Model, stream) == 432);

// turbomind::Request, its generation configuration. stop_ids: tokens of all stop words, one after
// another, and where each word ends among them.
struct GenerationRequest {
    std::byte unused0[40];
    std::vector<int> eos_ids;
    std::vector<int> stop_ids, stop_ends;
};
static_assert(offsetof(GenerationRequest, eos_ids) == 40 && offsetof(GenerationRequest, stop_ends) == 88);

constexpr int kFloat32 = 1 << 16 | 8 << 8 | 23; // of DataType: bits of sign, exponent and mantissa

namespace names {
#define SAGEC_LV "_ZN9turbomind7LlamaV2"
inline constexpr char kForward[] =
    SAGEC_LV "7ForwardENS_4core7Buffer_IiEENS1_6TensorES4_NS1_6BufferES5_S3_S3_S5_PNS_9MropeRopeES4_S5_S5_"
             "S5_iiPPKNS_8SequenceE";
inline constexpr char kPostDecodeEmbedding[] =
    SAGEC_LV "19postDecodeEmbeddingERKNS_4core6TensorENS1_6BufferE";
inline constexpr char kDynamicDecode[] =
    SAGEC_LV "13dynamicDecodeENS_4core6BufferES2_S2_NS1_6TensorES3_S2_S2_S2_S2_S2_S2_S2_ii";
#undef SAGEC_LV
inline constexpr char kSetup[] = "_ZN9turbomind18DynamicDecodeLayer5SetupERKSt6vectorIPKNS_7RequestESaIS4_"
                                 "EERKNS_4core9TensorMapE";
inline constexpr char kPrepare[] = "_ZN9turbomind11LlamaWeight7prepareERK14cudaDeviceProp";
inline constexpr char kIndexedCopy[] = "_ZN9turbomind17invokeIndexedCopyEPPvS1_PKiS3_S3_iiP11CUstream_st";
inline constexpr char kBatchedCopy[] = "_ZN9turbomind17invokeBatchedCopyEPPvS1_PiiP11CUstream_st";
inline constexpr char kGatherOutput[] = "_ZN9turbomind18invokeGatherOutputEPiPKiS2_iiiiP11CUstream_st";
inline constexpr char kCastFloat2D[] =
    "_ZN9turbomind17invokeCastFloat2DERKNS_4core6TensorERS1_P11CUstream_st";
inline constexpr char kAllReduceSum[] =
    "_ZN9turbomind4comm12NcclCommImpl12AllReduceSumEPKvPvmNS_8DataTypeEiP11CUstream_st";
} // namespace names

} // namespace sagec::tm::toy
