/* What the patched TurboMind offers to whoever drives it: a C ABI, called from Python through ctypes.
 *
 * Words. A *session* is TurboMind's name of a request: 64 bits, of which the upper 16 are the number
 * of the *instance* (an engine of this process, 1 or more) that it runs on; sessions with 0 there are
 * nobody's of ours and stay stock. So does a step in which an engine has sessions of several numbers,
 * and nobody is told of it: an engine is one instance's. A *rank* is a tensor-parallel thread of an
 * instance. *context* are the tokens of a session (prompt and output), *computed* those whose KV is in
 * its blocks: progress is absolute. All ranges are half-open. Times are microseconds of CLOCK_MONOTONIC.
 *
 * Functions that can refuse return NULL, or one line that says what and why, valid until the thread
 * calls again. Every function may be called from any thread; none needs the GIL or calls Python.
 */
#ifndef SAGEC_TURBOMIND_H
#define SAGEC_TURBOMIND_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define SAGEC_TM_ABI 1
#define SAGEC_TM_INSTANCE_SHIFT 48

/* ---- the patch: library.cc, selftest.cc -------------------------------------------------------- */

int32_t sagec_tm_abi(void);          /* SAGEC_TM_ABI of this build */
const char *sagec_tm_seams(void);    /* are all functions that we hook exported and called by PLT? */
const char *sagec_tm_selftest(void); /* are the layouts those of abi.h? on a throw-away in host memory */
const char *sagec_tm_apply(void);    /* seams, selftest, then every slot or none; twice is once */
const char *sagec_tm_revert(void);   /* every slot back; refused while an instance is open */
int32_t sagec_tm_num_slots(void);    /* slots patched now */

/* ---- instances ---------------------------------------------------------------------------------- */

/* Who decides the steps of an instance. */
enum {
    SAGEC_TM_STOCK = 0,   /* TurboMind itself; steps are still reported */
    SAGEC_TM_PLANS = 1,   /* the plan posted last, step by step */
    SAGEC_TM_ANSWERS = 2, /* whoever answers the question of each step */
};

typedef struct {
    int32_t decider;      /* one of the above */
    int32_t strict;       /* 1: nobody else computes in a decided step; 0: what is left over is stock's */
    int32_t guard;        /* 1: the prefix trie publishes computed blocks alone; 0: as stock does (unsafe) */
    int32_t num_ranks;    /* tensor-parallel ranks: how many threads take each decision */
    int64_t deadline_us;  /* no decision for so long though there is work: stock decides that step */
    int64_t log_capacity; /* int64s that the event log holds; a reader that is slower loses none, the
                             engine waits for nobody: the log grows, by 48 bytes for a row of a step,
                             until it is read or the instance closed. 0: 65536 to begin with */
} sagec_tm_options;

const char *sagec_tm_open(uint32_t instance, const sagec_tm_options *options); /* 1 .. 65535, not open yet */
void sagec_tm_close(uint32_t instance); /* its sessions become stock's; whoever waits is woken */
void sagec_tm_wake(uint32_t instance);  /* a step on hold looks again, e.g. at the engine's queue */

/* ---- 0003: decisions ------------------------------------------------------------------------------ */

/* The columns of an ExecutionPlan; a row a request. `sessions` may name some that are not there yet:
 * then the engine looks at its queue once before the plan begins. Steps whose chunks and decodes find
 * nobody are passed over. Rules: plan_cursor.h. */
typedef struct {
    int64_t plan; /* grows; takes over from an older one at the next step */
    int64_t num_steps, max_step_tokens;
    int32_t mixes_phases; /* 0: a step with chunks decodes nobody */
    int32_t num_rows, num_chunks, num_decodes;
    const uint64_t *sessions;     /* [rows] */
    const int64_t *prompt_tokens; /* [rows] tokens to compute before the first is sampled */
    const int64_t *reused_tokens; /* [rows] thought to be in the prefix cache; may be fewer */
    const int64_t *chunk_step, *chunk_row, *chunk_begin, *chunk_end;     /* [chunks], steps ascending */
    const int64_t *decode_row, *decode_begin_step, *decode_until_tokens; /* [decodes] */
} sagec_tm_plan;

const char *sagec_tm_post_plan(uint32_t instance, const sagec_tm_plan *plan);

/* A step that waits for an answer, and who could compute in it. */
typedef struct {
    int64_t step; /* 1, 2, ... of the instance, one for each decision; an answer names it */
    int32_t num_rows, free_blocks, cached_blocks, budget_tokens; /* budget: the most the engine takes */
} sagec_tm_question;

typedef struct {
    uint64_t session, priority;             /* priority: stock's, lower is first */
    int32_t context, computed, status, pad; /* status: 1 it waits, 2 the last step computed it */
} sagec_tm_row;

/* One computes tokens [computed, min(end, context)). */
typedef struct {
    uint64_t session;
    int64_t end;
} sagec_tm_item;

/* 1 and the question, its first `capacity` rows; 0 after timeout_us without one, or closed. */
int32_t sagec_tm_wait_question(uint32_t instance, int64_t timeout_us, sagec_tm_question *question,
                               sagec_tm_row *rows, int32_t capacity);
/* In this order; at most one item may leave its context unfinished, a second one is left out. Who has
 * left since the question is ignored. No items: the step is held, and asked again under the next number.
 * Too late, of another step, another instance's sessions, or one twice: refused. */
const char *sagec_tm_answer(uint32_t instance, int64_t step, const sagec_tm_item *items, int32_t num_items);

/* ---- what happened: the event log ------------------------------------------------------------------ */

/* An event is int64s: kind, number of int64s in all, then its fields. Rank 0 speaks for an instance. */
enum {
    /* A step that was computed. step, plan (0: none), plan_step, decided_by, begin_us, end_us,
     * active_blocks, cached_blocks, free_blocks, num_rows; then for each row:
     * session, begin, end, planned_end (0: not planned), token (sampled; else 0), flags.
     * Rows that were planned and not computed stand there too, with begin = end: they found no room, the
     * engine's budget was used up, or another row of the step was left unfinished already. Not planned,
     * though a plan says so: decodes that wait for room while others go on, and what the budget has no
     * room for since the prefix cache had less than the plan took it for. */
    SAGEC_TM_STEP = 1,
    SAGEC_TM_PLAN_DONE = 2, /* plan: all its steps are gone by, or a newer plan took over */
    SAGEC_TM_ERASED = 3, /* session, computed: it holds nothing any more; after EXPORTED, if any, and before
                            the step that finished it, if one did */
    SAGEC_TM_PREEMPTED = 4,     /* session, computed before, after: it lost KV to others */
    SAGEC_TM_MATCHED = 5,       /* session, tokens: the prefix cache had so many of them */
    SAGEC_TM_STORED = 6,        /* session, num_blocks, uid of each: its first blocks, now in the trie */
    SAGEC_TM_EVICTED = 7,       /* num_blocks, uid of each: cached blocks that are gone */
    SAGEC_TM_EXPORTED = 8,      /* session, tokens, num_bytes, begin_us, end_us: take it */
    SAGEC_TM_IMPORTED = 9,      /* session, tokens, num_bytes, begin_us, end_us */
    SAGEC_TM_NOT_IMPORTED = 10, /* session, why (see below): an ordinary prefill follows */
    SAGEC_TM_GAP = 11,          /* session, plan, plan_step, begin, computed: a chunk behind tokens that
                                   nobody computed, or (begin <= computed) one that ends behind the
                                   session's context; it and the session's later ones are left out */
};

enum { SAGEC_TM_BY_STOCK = 0, SAGEC_TM_BY_PLAN = 1, SAGEC_TM_BY_ANSWER = 2, SAGEC_TM_BY_DEADLINE = 3 };
enum { SAGEC_TM_ROW_SAMPLED = 1, SAGEC_TM_ROW_FINISHED = 2 };
/* Why KV was not imported: too few free and cached blocks (it is tried again as long as the session has
 * computed nothing); another rank could not, or did not come; the blob covers the whole context, of
 * which one token must be left to compute; blocks of another size; other tokens; CUDA refused. */
enum {
    SAGEC_TM_NO_ROOM = 1,
    SAGEC_TM_NOT_ALL_RANKS = 2,
    SAGEC_TM_TOO_LONG = 3,
    SAGEC_TM_OTHER_BLOCKS = 4,
    SAGEC_TM_OTHER_TOKENS = 5,
    SAGEC_TM_NOT_COPIED = 6
};

/* Events since the last call, whole ones only, at most `capacity` int64s; waits up to timeout_us for
 * the first. Returns how many int64s were written; where the first event does not fit: minus its size. */
int64_t sagec_tm_read(uint32_t instance, int64_t *events, int64_t capacity, int64_t timeout_us);

/* ---- 0001: KV --------------------------------------------------------------------------------------- */

typedef struct {
    int64_t uid, timestamp; /* uid 0: the block is free */
    int32_t id, use_count;  /* use_count 0 and a uid: cached */
    void *data;
} sagec_tm_block;

typedef struct {
    int64_t block_bytes;
    int32_t block_tokens, num_blocks, active, cached, free, pad;
} sagec_tm_blocks;

/* The blocks of a rank as the last step left them: totals, and up to `capacity` of them. */
const char *sagec_tm_get_block_info(uint32_t instance, int32_t rank, sagec_tm_blocks *totals,
                                    sagec_tm_block *blocks, int32_t capacity);

typedef void (*sagec_tm_evicted)(uint32_t instance, int32_t block, uint64_t uid, void *argument);
/* Called on the engine's thread, with its locks held: be quick, call nothing here. NULL: nobody. */
const char *sagec_tm_register_eviction_callback(uint32_t instance, sagec_tm_evicted callback, void *argument);

enum { SAGEC_TM_TO_HOST = 1, SAGEC_TM_TO_DEVICE = 2 };
typedef struct {
    uint64_t session;
    int32_t direction, pad;
    const void *blob;  /* TO_DEVICE: what the other side exported; is copied */
    int64_t num_bytes; /* of the blob */
    uint64_t layout;   /* TO_DEVICE: fingerprint that the blob must have */
} sagec_tm_move;

/* TO_HOST: when the session is erased, its KV is copied to host memory first: EXPORTED.
 * TO_DEVICE: before the session is submitted. When it is first scheduled, it begins with the blob's
 * KV: IMPORTED, or NOT_IMPORTED and an ordinary prefill. A blob that is cut, altered, of another
 * layout or too late is refused here, by name, and nothing is staged. All moves or none. */
const char *sagec_tm_migrate_blocks(uint32_t instance, const sagec_tm_move *moves, int32_t num_moves);
void sagec_tm_forget(uint32_t instance, uint64_t session); /* what migrate_blocks asked, and its blob */

/* The exported blob: copied to `blob`, and forgotten. num_bytes must be its size. */
const char *sagec_tm_take_export(uint32_t instance, uint64_t session, void *blob, int64_t num_bytes);
/* What `layout` of this instance's blobs is: of block size, block tokens, ranks and `seed`
 * (the caller's hash of model, precision and whatever else must agree). */
uint64_t sagec_tm_layout(uint64_t seed, int64_t block_bytes, int32_t block_tokens, int32_t num_ranks);
void sagec_tm_set_layout(uint32_t instance, uint64_t layout); /* what this instance's exports carry */
/* The checksum of blobs, CRC-32C; for tests, by_table: without the processor's instruction. */
uint32_t sagec_tm_crc32c(const void *bytes, int64_t num_bytes, int32_t by_table);

/* ---- counters ----------------------------------------------------------------------------------------- */

typedef struct {
    int64_t steps, held_steps, fallbacks; /* computed; with nothing to compute; past the deadline */
    int64_t unplanned_rows, missed_rows;  /* computed though not planned; planned, not computed */
    int64_t guarded_blocks;               /* that stock would have published too early */
    int64_t matched_tokens, stored_blocks, evicted_blocks, preemptions;
    int64_t exports, imports, refused_imports;
} sagec_tm_counters;
const char *sagec_tm_count(uint32_t instance, sagec_tm_counters *counters);

/* For tests: a plan's cursor without an engine. NULL where the plan is refused. `next` puts the items of
 * the next step that has any for these rows into `items` and returns their number, at most `capacity`,
 * and `plan_step`; 0: there is none. `gaps` are the chunks left out so far, as GAP tells of them. */
void *sagec_tm_cursor_new(const sagec_tm_plan *plan);
int32_t sagec_tm_cursor_next(void *cursor, const sagec_tm_row *rows, int32_t num_rows, sagec_tm_item *items,
                             int32_t capacity, int64_t *plan_step);
int32_t sagec_tm_cursor_gaps(void *cursor);
void sagec_tm_cursor_free(void *cursor);

/* 0004: collectives of this process, all instances. */
enum {
    SAGEC_TM_ALL_REDUCE,
    SAGEC_TM_ALL_GATHER,
    SAGEC_TM_REDUCE_SCATTER,
    SAGEC_TM_BROADCAST,
    SAGEC_TM_REDUCE,
    SAGEC_TM_NUM_COLLECTIVES
};
typedef struct {
    int64_t calls, bytes;
    int64_t enqueue_ns; /* host time: it only enqueues */
    int64_t device_us;  /* between events on the stream, of `timed_calls` calls */
    int64_t timed_calls;
} sagec_tm_collective;
void sagec_tm_collectives(sagec_tm_collective collectives[SAGEC_TM_NUM_COLLECTIVES]);
/* Time one call in `every` on its stream; 0: none (as it begins). */
void sagec_tm_time_collectives(int32_t every);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
