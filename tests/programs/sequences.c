// Counts in restartable sequences, without locks or atomic instructions, on whichever processor it is: sequences LOG.
// A sequence that went on after its thread was elsewhere loses a count.
#include <fcntl.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/rseq.h>
#include <unistd.h>

#define THREADS 3
#define TURNS 20000
#define PROCESSORS 256

static int log_fd;
static struct { uint64_t count; char line[56]; } counts[PROCESSORS] __attribute__((aligned(64)));

static volatile struct rseq *area(void) {
    return (volatile struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
}

// Adds one to this processor's count; what it was taken out of it does again. The loop between load and store makes the
// sequence long enough to be found in.
static void count(void) {
    volatile struct rseq *rseq = area();
    __asm__ volatile(
        ".pushsection __rseq_cs, \"aw\"\n .balign 32\n"
        "3: .long 0, 0\n .quad 1f, 2f-1f, 4f\n .popsection\n"
        "5: leaq 3b(%%rip), %%rax\n movq %%rax, %[cs]\n"
        "1: movl %[cpu], %%ecx\n shlq $6, %%rcx\n addq %[counts], %%rcx\n"
        "movq (%%rcx), %%rdx\n movl $400, %%eax\n"
        "6: decl %%eax\n jnz 6b\n"
        "incq %%rdx\n movq %%rdx, (%%rcx)\n"
        "2: jmp 7f\n"
        ".byte 0x0f, 0xb9, 0x3d\n .long 0x53053053\n"
        "4: jmp 5b\n"
        "7:\n"
        : [cs] "=m"(rseq->rseq_cs)
        : [cpu] "m"(rseq->cpu_id), [counts] "r"(counts)
        : "rax", "rcx", "rdx", "memory", "cc");
}

static void *count_many(void *none) {
    for (int turn = 0; turn < TURNS; turn++) count();
    return none;
}

int main(int argc, char **argv) {
    log_fd = open(argv[argc - 1], O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (!__rseq_size) {
        dprintf(log_fd, "MISMATCH the C library has no rseq\n");
        return 1;
    }
    for (uint64_t round = 1;; round++) {
        pthread_t threads[THREADS];
        for (int i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, count_many, NULL);
        count_many(NULL);
        for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
        uint64_t sum = 0;
        for (int cpu = 0; cpu < PROCESSORS; cpu++) sum += counts[cpu].count;
        if (sum != round * (THREADS + 1) * TURNS) {
            dprintf(log_fd, "MISMATCH %lu counts, and not %lu\n", sum, round * (THREADS + 1) * TURNS);
            return 1;
        }
        dprintf(log_fd, "line=%lu\n", round);
    }
}
