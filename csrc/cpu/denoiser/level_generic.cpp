// For any CPU.
#define GAITFAST_LEVEL 0
#define GAITFAST_TABLE kGenericKernels
#include "table.h"
