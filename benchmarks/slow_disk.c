/* A disk that takes its time: every fsync and fdatasync lasts SLOW_DISK_US microseconds longer.
   Preloaded by benchmarks/disks.py. Waits side by side, as a disk does that has room in its queue. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static int slowly(const char *name, int file)
{
    int (*flush)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    const char *pause = getenv("SLOW_DISK_US");
    if (pause != NULL)
        usleep((useconds_t)atoi(pause));
    return flush(file);
}

int fsync(int file) { return slowly("fsync", file); }

int fdatasync(int file) { return slowly("fdatasync", file); }
