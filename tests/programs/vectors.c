// Keeps its vector and x87 registers full, and finds out if any of them changes: vectors LOG.
// Each round loads all of them with values of its own, stays in a loop without any call, and compares.
#include <fcntl.h>
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

static int log_fd;

static void die(const char *what, unsigned long round) {
    dprintf(log_fd, "MISMATCH %s in round %lu\n", what, round);
    _exit(1);
}

// All sixteen ymm registers, eight x87 registers, and MXCSR and the x87 control word at unusual values.
static void hold(uint64_t seed, unsigned long round) {
    uint64_t in[16][4], out[16][4];
    double x87_in[8], x87_out[8];
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 4; j++) in[i][j] = seed * 0x9e3779b97f4a7c15u + i * 31 + j;
    for (int i = 0; i < 8; i++) x87_in[i] = (double)(seed % 1000) * 1.25 + i;
    uint32_t mxcsr = 0x1f80 | 0x8040, mxcsr_out, mxcsr_usual = 0x1f80;
    uint16_t control = 0x067f, control_out, control_usual = 0x037f;
    uint64_t turns = 400000;
    __asm__ volatile(
        "ldmxcsr %[mxcsr]\n fldcw %[control]\n"
        "fldl 0(%[xin])\n fldl 8(%[xin])\n fldl 16(%[xin])\n fldl 24(%[xin])\n"
        "fldl 32(%[xin])\n fldl 40(%[xin])\n fldl 48(%[xin])\n fldl 56(%[xin])\n"
        "vmovdqu 0(%[in]),%%ymm0\n vmovdqu 32(%[in]),%%ymm1\n vmovdqu 64(%[in]),%%ymm2\n vmovdqu 96(%[in]),%%ymm3\n"
        "vmovdqu 128(%[in]),%%ymm4\n vmovdqu 160(%[in]),%%ymm5\n vmovdqu 192(%[in]),%%ymm6\n vmovdqu 224(%[in]),%%ymm7\n"
        "vmovdqu 256(%[in]),%%ymm8\n vmovdqu 288(%[in]),%%ymm9\n vmovdqu 320(%[in]),%%ymm10\n vmovdqu 352(%[in]),%%ymm11\n"
        "vmovdqu 384(%[in]),%%ymm12\n vmovdqu 416(%[in]),%%ymm13\n vmovdqu 448(%[in]),%%ymm14\n vmovdqu 480(%[in]),%%ymm15\n"
        "1: dec %[turns]\n jnz 1b\n"
        "vmovdqu %%ymm0,0(%[out])\n vmovdqu %%ymm1,32(%[out])\n vmovdqu %%ymm2,64(%[out])\n vmovdqu %%ymm3,96(%[out])\n"
        "vmovdqu %%ymm4,128(%[out])\n vmovdqu %%ymm5,160(%[out])\n vmovdqu %%ymm6,192(%[out])\n vmovdqu %%ymm7,224(%[out])\n"
        "vmovdqu %%ymm8,256(%[out])\n vmovdqu %%ymm9,288(%[out])\n vmovdqu %%ymm10,320(%[out])\n vmovdqu %%ymm11,352(%[out])\n"
        "vmovdqu %%ymm12,384(%[out])\n vmovdqu %%ymm13,416(%[out])\n vmovdqu %%ymm14,448(%[out])\n vmovdqu %%ymm15,480(%[out])\n"
        "fstpl 56(%[xout])\n fstpl 48(%[xout])\n fstpl 40(%[xout])\n fstpl 32(%[xout])\n"
        "fstpl 24(%[xout])\n fstpl 16(%[xout])\n fstpl 8(%[xout])\n fstpl 0(%[xout])\n"
        "stmxcsr %[mxcsr_out]\n fnstcw %[control_out]\n"
        "ldmxcsr %[mxcsr_usual]\n fldcw %[control_usual]\n vzeroupper\n"
        : [turns] "+r"(turns), [mxcsr_out] "=m"(mxcsr_out), [control_out] "=m"(control_out)
        : [in] "r"(in), [out] "r"(out), [xin] "r"(x87_in), [xout] "r"(x87_out), [mxcsr] "m"(mxcsr), [control] "m"(control),
          [mxcsr_usual] "m"(mxcsr_usual), [control_usual] "m"(control_usual)
        : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
          "xmm12", "xmm13", "xmm14", "xmm15");
    if (memcmp(in, out, sizeof in)) die("a ymm register", round);
    if (memcmp(x87_in, x87_out, sizeof x87_in)) die("an x87 register", round);
    if ((mxcsr_out & 0xffc0) != (mxcsr & 0xffc0)) die("MXCSR", round);
    if (control_out != control) die("the x87 control word", round);
}

// In a thread that may not read the time stamp counter.
static void *hold_forever(void *seed) {
    prctl(PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0, 0);
    for (unsigned long round = 0;; round++) {
        hold((uint64_t)seed + round, round);
        int counter = 0;
        if (prctl(PR_GET_TSC, &counter, 0, 0, 0) || counter != PR_TSC_SIGSEGV) die("PR_GET_TSC", round);
        usleep(100);
    }
}

int main(int argc, char **argv) {
    log_fd = open(argv[argc - 1], O_WRONLY | O_CREAT | O_APPEND, 0644);
    pthread_t thread;
    pthread_create(&thread, NULL, hold_forever, (void *)77);
    for (unsigned long round = 0;; round++) {
        hold(round, round);
        if (round % 16 == 0) dprintf(log_fd, "line=%lu\n", round);
    }
}
