#if defined(__x86_64__)
#define CHUNKFT_LOOPS kAvx2AdamwLoops
#define CHUNKFT_LOOPS_NAME "avx2"
#include "host_adamw_loops.inc"
#endif
