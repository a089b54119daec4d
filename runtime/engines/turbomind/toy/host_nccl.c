/* libnccl.so.2 between the threads of one process: every rank of a communicator calls the same collective,
 * the last one to come computes it for all, and then all go on. Sums are really computed, so ranks that
 * disagree are found out. A rank that comes with another collective, length, type or root than the first
 * is a mistake that NCCL would hang on: here it is said, and fails on every rank.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5 };
enum { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16, NUM_TYPES };
enum kind { ALL_REDUCE, REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST };

#define MAX_RANKS 64
#define SUM 0
#define VERSION 22703

static const size_t TYPE_BYTES[NUM_TYPES] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};

struct call {
    enum kind kind;
    size_t count; /* elements: of all-gather and reduce-scatter those of one rank */
    int type, op, root;
};

struct unique_id {
    char bytes[128];
};

/* A communicator: shared by its ranks, kept from the first that joins to the last that leaves. */
struct group {
    struct unique_id id;
    int num_ranks, num_members, num_arrived;
    int failure; /* of the round under way */
    int result;  /* of the last round, which all leave before the next can end */
    uint64_t round;
    struct call call;
    const char *sent[MAX_RANKS];
    char *received[MAX_RANKS];
    pthread_mutex_t mutex;
    pthread_cond_t done;
    struct group *next;
};

struct member {
    struct group *group;
    int rank;
};

static pthread_mutex_t groups_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct group *groups;
static uint64_t num_ids;

/* ---- communicators ------------------------------------------------------------------------------------ */

int ncclGetVersion(int *version) {
    *version = VERSION;
    return SUCCESS;
}

int ncclGetUniqueId(struct unique_id *id) {
    memset(id, 0, sizeof *id);
    pthread_mutex_lock(&groups_mutex);
    ++num_ids;
    memcpy(id->bytes, &num_ids, sizeof num_ids);
    pthread_mutex_unlock(&groups_mutex);
    return SUCCESS;
}

/* The group of this name, made where there is none; groups_mutex is held. */
static struct group *group_named(const struct unique_id *id, int num_ranks) {
    for (struct group *each = groups; each; each = each->next)
        if (memcmp(&each->id, id, sizeof *id) == 0)
            return each;
    struct group *made = calloc(1, sizeof *made);
    if (!made)
        return NULL;
    made->id = *id;
    made->num_ranks = num_ranks;
    pthread_mutex_init(&made->mutex, NULL);
    pthread_cond_init(&made->done, NULL);
    made->next = groups;
    groups = made;
    return made;
}

int ncclCommInitRank(struct member **communicator, int num_ranks, struct unique_id id, int rank) {
    if (num_ranks < 1 || num_ranks > MAX_RANKS || rank < 0 || rank >= num_ranks)
        return INVALID_ARGUMENT;
    struct member *member = malloc(sizeof *member);
    if (!member)
        return SYSTEM_ERROR;
    pthread_mutex_lock(&groups_mutex);
    struct group *group = group_named(&id, num_ranks);
    if (group)
        ++group->num_members;
    pthread_mutex_unlock(&groups_mutex);
    *member = (struct member){group, rank};
    *communicator = member;
    return group ? SUCCESS : SYSTEM_ERROR;
}

int ncclCommDestroy(struct member *member) {
    struct group *group = member->group;
    pthread_mutex_lock(&groups_mutex);
    if (--group->num_members == 0) {
        struct group **link = &groups;
        while (*link != group)
            link = &(*link)->next;
        *link = group->next;
        pthread_cond_destroy(&group->done);
        pthread_mutex_destroy(&group->mutex);
        free(group);
    }
    pthread_mutex_unlock(&groups_mutex);
    free(member);
    return SUCCESS;
}

int ncclCommCount(const struct member *member, int *num_ranks) {
    *num_ranks = member->group->num_ranks;
    return SUCCESS;
}

int ncclCommUserRank(const struct member *member, int *rank) {
    *rank = member->rank;
    return SUCCESS;
}

const char *ncclGetErrorString(int error) {
    return error == SUCCESS ? "no error" : "refused by the host's stand-in for NCCL";
}

/* ---- sums ---------------------------------------------------------------------------------------------- */

static float of_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Rounded to the nearest, to even where two are as near. */
static uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#define ADD(type)                                                                                            \
    for (size_t i = 0; i < count; ++i)                                                                       \
        ((type *)sum)[i] += ((const type *)addend)[i];                                                       \
    break

/* sum[i] += addend[i] for `count` elements. */
static void add(void *sum, const void *addend, size_t count, int type) {
    switch (type) {
    case INT8:
    case UINT8:
        ADD(uint8_t);
    case INT32:
    case UINT32:
        ADD(uint32_t);
    case INT64:
    case UINT64:
        ADD(uint64_t);
    case FLOAT16:
        ADD(_Float16);
    case FLOAT32:
        ADD(float);
    case FLOAT64:
        ADD(double);
    case BFLOAT16:
        for (size_t i = 0; i < count; ++i) {
            uint16_t *at = (uint16_t *)sum + i;
            *at = to_bfloat16(of_bfloat16(*at) + of_bfloat16(((const uint16_t *)addend)[i]));
        }
    }
}

/* ---- collectives ----------------------------------------------------------------------------------------
 */

/* What all ranks receive of a reduction: the sum, whole, or a part each. */
static int reduce(struct group *group, const struct call *call) {
    const size_t parts = call->kind == REDUCE_SCATTER ? (size_t)group->num_ranks : 1;
    const size_t part_bytes = call->count * TYPE_BYTES[call->type];
    char *sum = malloc(parts * part_bytes + 1);
    if (!sum)
        return SYSTEM_ERROR;
    memcpy(sum, group->sent[0], parts * part_bytes);
    for (int rank = 1; rank < group->num_ranks; ++rank)
        add(sum, group->sent[rank], parts * call->count, call->type);
    for (int rank = 0; rank < group->num_ranks; ++rank)
        if (call->kind != REDUCE || rank == call->root)
            memcpy(group->received[rank], sum + (parts > 1 ? rank * part_bytes : 0), part_bytes);
    free(sum);
    return SUCCESS;
}

/* What all ranks receive of one another: everybody's, or the root's. Buffers may be those sent. */
static int gather(struct group *group, const struct call *call) {
    const size_t bytes = call->count * TYPE_BYTES[call->type];
    for (int target = 0; target < group->num_ranks; ++target)
        for (int source = 0; source < group->num_ranks; ++source)
            if (call->kind == ALL_GATHER)
                memmove(group->received[target] + source * bytes, group->sent[source], bytes);
            else if (source == call->root)
                memmove(group->received[target], group->sent[source], bytes);
    return SUCCESS;
}

static int run(struct group *group, const struct call *call) {
    const int reduces = call->kind == ALL_REDUCE || call->kind == REDUCE || call->kind == REDUCE_SCATTER;
    if (call->type < 0 || call->type >= NUM_TYPES || call->root >= group->num_ranks) {
        fputs("sagec: the host's stand-in for NCCL: no such element type or root\n", stderr);
        return INVALID_ARGUMENT;
    }
    if (reduces && call->op != SUM) {
        fputs("sagec: the host's stand-in for NCCL reduces by sums alone\n", stderr);
        return INVALID_ARGUMENT;
    }
    return reduces ? reduce(group, call) : gather(group, call);
}

static int is_same(const struct call *call, const struct call *other) {
    return call->kind == other->kind && call->count == other->count && call->type == other->type &&
           call->op == other->op && call->root == other->root;
}

/* Wait for all ranks, and return what came of it. */
static int meet(struct member *member, const struct call *call, const void *sent, void *received) {
    struct group *group = member->group;
    pthread_mutex_lock(&group->mutex);
    if (group->num_arrived == 0) {
        group->call = *call;
        group->failure = SUCCESS;
    } else if (!is_same(call, &group->call)) {
        fputs("sagec: ranks called different collectives of the host's stand-in for NCCL\n", stderr);
        group->failure = INVALID_USAGE;
    }
    group->sent[member->rank] = sent;
    group->received[member->rank] = received;
    const uint64_t round = group->round;
    if (++group->num_arrived == group->num_ranks) {
        group->result = group->failure ? group->failure : run(group, &group->call);
        group->num_arrived = 0;
        ++group->round;
        pthread_cond_broadcast(&group->done);
    }
    while (group->round == round)
        pthread_cond_wait(&group->done, &group->mutex);
    const int result = group->result;
    pthread_mutex_unlock(&group->mutex);
    return result;
}

/* As with NCCL, what is called in a group is done when the group ends. */
struct pending {
    struct member *member;
    struct call call;
    const void *sent;
    void *received;
};
static _Thread_local struct pending pending[2 * MAX_RANKS];
static _Thread_local int depth, num_pending;

static int call(struct member *member, struct call call, const void *sent, void *received) {
    if (depth == 0)
        return meet(member, &call, sent, received);
    if (num_pending == 2 * MAX_RANKS)
        return INVALID_USAGE;
    pending[num_pending++] = (struct pending){member, call, sent, received};
    return SUCCESS;
}

int ncclGroupStart(void) {
    ++depth;
    return SUCCESS;
}

int ncclGroupEnd(void) {
    if (depth == 0)
        return INVALID_USAGE;
    if (--depth > 0)
        return SUCCESS;
    int result = SUCCESS;
    for (int i = 0; i < num_pending; ++i) {
        const int refused = meet(pending[i].member, &pending[i].call, pending[i].sent, pending[i].received);
        result = refused ? refused : result;
    }
    num_pending = 0;
    return result;
}

int ncclAllReduce(const void *sent, void *received, size_t count, int type, int op, struct member *member,
                  void *stream) {
    (void)stream;
    return call(member, (struct call){ALL_REDUCE, count, type, op, 0}, sent, received);
}

int ncclReduce(const void *sent, void *received, size_t count, int type, int op, int root,
               struct member *member, void *stream) {
    (void)stream;
    return call(member, (struct call){REDUCE, count, type, op, root}, sent, received);
}

int ncclReduceScatter(const void *sent, void *received, size_t count, int type, int op, struct member *member,
                      void *stream) {
    (void)stream;
    return call(member, (struct call){REDUCE_SCATTER, count, type, op, 0}, sent, received);
}

int ncclAllGather(const void *sent, void *received, size_t count, int type, struct member *member,
                  void *stream) {
    (void)stream;
    return call(member, (struct call){ALL_GATHER, count, type, SUM, 0}, sent, received);
}

int ncclBroadcast(const void *sent, void *received, size_t count, int type, int root, struct member *member,
                  void *stream) {
    (void)stream;
    return call(member, (struct call){BROADCAST, count, type, SUM, root}, sent, received);
}
