/*
 * The least a copy of extents can be: one thread, one buffer, pread and pwrite with direct I/O in
 * order, one fsync. What `make bench` measures blktrack's copying against.
 *
 *	copyref SOURCE REPLICA < extents	lines of "start length", bytes
 *
 * Prints seconds (opening and fsync included, reading the list not) and bytes.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define CHUNK (4 << 20)

struct extent {
	long long start, length;
};

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	struct extent *list = NULL, e;
	size_t count = 0, room = 0;
	long long bytes = 0;
	void *buffer;
	double begin;
	int in, out;

	if (argc != 3)
		errx(2, "usage: copyref SOURCE REPLICA < extents");
	while (scanf("%lld %lld", &e.start, &e.length) == 2) {
		if (count == room) {
			room = room ? 2 * room : 1024;
			list = realloc(list, room * sizeof(*list));
			if (!list)
				err(1, "realloc");
		}
		list[count++] = e;
	}
	begin = now();
	in = open(argv[1], O_RDONLY | O_DIRECT);
	if (in < 0)
		err(1, "%s", argv[1]);
	out = open(argv[2], O_WRONLY | O_DIRECT);
	if (out < 0)
		err(1, "%s", argv[2]);
	errno = posix_memalign(&buffer, 4096, CHUNK);
	if (errno)
		err(1, "posix_memalign");
	for (size_t i = 0; i < count; i++) {
		long long at = list[i].start, end = at + list[i].length;

		while (at < end) {
			size_t want = end - at < CHUNK ? end - at : CHUNK;

			if (pread(in, buffer, want, at) != (ssize_t)want)
				err(1, "%s at %lld", argv[1], at);
			if (pwrite(out, buffer, want, at) != (ssize_t)want)
				err(1, "%s at %lld", argv[2], at);
			at += want;
			bytes += want;
		}
	}
	if (fsync(out))
		err(1, "%s", argv[2]);
	printf("%.6f %lld\n", now() - begin, bytes);
	return 0;
}
