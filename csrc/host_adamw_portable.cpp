#define CHUNKFT_LOOPS kPortableAdamwLoops
#define CHUNKFT_LOOPS_NAME "portable"
#include "host_adamw_loops.inc"
