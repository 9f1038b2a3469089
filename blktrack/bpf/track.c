// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * The programs. Request-based disks are followed through requests: issue comes before the driver
 * sees the change, completion before the submitter hears of it. Bio-based ones (device-mapper, md,
 * zram) show only bios, and a completed bio no longer tells its range once it was split, so the range
 * is remembered from queue to completion by bio pointer. Where programs can be preempted, they
 * have copies (layout.py); what one has seen the others find done.
 *
 * Maps, all made and pinned by user space:
 *   windows   array of one   written by user space only
 *   planes    array of maps  swapped by user space; bits set here, cleared by user space once retired
 *   stats     per-CPU array  counted here
 *   inflight  hash           written here, by the bio programs only
 *   seen      hash           written here, where programs have copies
 *   caught    array          counted here, as well
 */
#include "track.h"

/* The kernel verifies this once in each program, for any change there could be, and not again wherever
 * it is called: it is a function with types (function.py). */
__attribute__((noinline)) int mark_change(struct change *c)
{
	if (c)
		mark_window(c);
	return 0;
}

/*
 * Discards of several ranges are one request whose first sector and summed length name no range
 * (blk_attempt_req_merge, ELEVATOR_DISCARD_MERGE): walk its bios. All pairs of a bio and a slot are
 * walked by one loop, which keeps the program short for the verifier.
 */
INLINE void mark_ranges(struct windows *ws, u32 number, u32 plane, void *bio)
{
	u32 slot = SLOTS;

	/* Slot numbers from memory, not from the loop: to the verifier they are then all alike. */
	FOR_EACH_SLOT(ws, KIND_REQUEST, number, s) {
		slot = ws->window[s].first;
		break;
	}
	for (int i = 0; i < MAX_RANGES && slot < SLOTS; i++) {
		struct window *w = &ws->window[slot];

		if (!bio)
			return;
		mark(slot, plane, FIELD(u64, bio, BIO_SECTOR), FIELD(u32, bio, BIO_SIZE) >> 9);
		slot = w->next;
		if (slot >= SLOTS) {
			slot = w->first;
			bio = FIELD(void *, bio, BIO_NEXT);
		}
	}
	if (bio && slot < SLOTS)
		COUNT(slot, overflow);
}

INLINE void mark_request(void *rq, u32 plane, volatile u32 *bytes)
{
	struct windows *ws = VALUE(MAP_WINDOWS);
	u32 op = OP(FIELD(u32, rq, RQ_CMD_FLAGS));
	void *bio;
	u32 number;

	if (HARMLESS(op))
		return;
	number = disk_number(RQ_DISK(rq));
	if (!number)
		return; /* a queue without a disk: NVMe admin commands, a SCSI host's own */
	if (!CHANGES(op)) {
		if (plane == SUBMITTED && !(op == REQ_OP_DRV_IN && *bytes))
			count_opaque(ws, KIND_REQUEST, number);
		return;
	}
	bio = FIELD(void *, rq, RQ_BIO);
	if (op == REQ_OP_DISCARD && bio != FIELD(void *, rq, RQ_BIOTAIL))
		mark_ranges(ws, number, plane, bio);
	else
		FOR_EACH_SLOT(ws, KIND_REQUEST, number, slot)
			mark(slot, plane, FIELD(u64, rq, RQ_SECTOR), *bytes >> 9);
}

INLINE void issue(void *rq, enum copy copy)
{
	if (its_turn(copy, KIND_REQUEST, rq))
		mark_request(rq, SUBMITTED, &FIELD(u32, rq, RQ_DATA_LEN));
}

int blk_rq_issue(u64 *ctx)
{
	issue((void *)ctx[RQ_ISSUE_ARG], FIRST);
	return 0;
}

int blk_rq_issue_probe(struct pt_regs *regs)
{
#if PROBED
	issue(SECOND(regs, TYPE_REQUEST), FIRST);
#endif
	return 0;
}

int blk_rq_issue_again(u64 *ctx)
{
	issue((void *)ctx[RQ_ISSUE_ARG], AGAIN);
	return 0;
}

int blk_rq_issue_last(u64 *ctx)
{
	issue((void *)ctx[RQ_ISSUE_ARG], LAST);
	return 0;
}

/* Traced before each part of a request is advanced over (blk_update_request): sector and byte count
 * name that part. A failed one may have reached the medium in part and counts as well. */
int blk_rq_complete(u64 *ctx)
{
	void *rq = (void *)ctx[RQ_COMPLETE_ARG];

	if (PREEMPTIBLE)
		forget_seen(rq);
	mark_request(rq, COMPLETED, (volatile u32 *)&ctx[RQ_COMPLETE_BYTES_ARG]);
	return 0;
}

/*
 * Mark a remembered bio as completed. A late one was not seen to complete at the time: until its
 * address is used again it stays in the table, where each drain finds it (tracking.py).
 */
INLINE void complete(struct windows *ws, volatile struct bio_range *bio, bool late)
{
	u32 number = bio->dev;

	FOR_EACH_SLOT(ws, KIND_BIO, number, slot) {
		mark(slot, COMPLETED, bio->sector, bio->bytes >> 9);
		if (late)
			COUNT(slot, late);
	}
}

INLINE void queue(void *bio, enum copy copy)
{
	struct windows *ws = VALUE(MAP_WINDOWS);
	u32 op = OP(FIELD(u32, bio, BIO_OPF));
	u32 bytes = FIELD(u32, bio, BIO_SIZE);
	struct bio_range entry = {};
	u64 key = (u64)bio;
	bool tracked = false;
	long error;

	if (!its_turn(copy, KIND_BIO, bio) || HARMLESS(op))
		return;
	entry.sector = FIELD(u64, bio, BIO_SECTOR);
	entry.bytes = bytes;
	entry.op = op;
	entry.dev = disk_number(BIO_DISK(bio));
	if (!entry.dev)
		return;
	if (!CHANGES(op)) {
		count_opaque(ws, KIND_BIO, entry.dev);
		return;
	}
	if (!bytes)
		return;

	FOR_EACH_SLOT(ws, KIND_BIO, entry.dev, slot) {
		mark(slot, SUBMITTED, entry.sector, bytes >> 9);
		tracked = true;
	}
	if (!tracked)
		return;

	error = bpf_map_update_elem(MAP(MAP_INFLIGHT), &key, &entry, BPF_NOEXIST);
	if (!error)
		return;
	if (error == -EEXIST) {
		/* The bio that had this address before was not seen to complete. */
		volatile struct bio_range *old = bpf_map_lookup_elem(MAP(MAP_INFLIGHT), &key);

		if (old)
			complete(ws, old, true);
		error = bpf_map_update_elem(MAP(MAP_INFLIGHT), &key, &entry, BPF_ANY);
	}
	if (error)
		FOR_EACH_SLOT(ws, KIND_BIO, entry.dev, slot)
			COUNT(slot, full);
}

int blk_bio_queue(u64 *ctx)
{
	queue((void *)ctx[BIO_QUEUE_ARG], FIRST);
	return 0;
}

int blk_bio_queue_probe(struct pt_regs *regs)
{
#if PROBED
	queue(SECOND(regs, TYPE_BIO), FIRST);
#endif
	return 0;
}

int blk_bio_queue_again(u64 *ctx)
{
	queue((void *)ctx[BIO_QUEUE_ARG], AGAIN);
	return 0;
}

int blk_bio_queue_last(u64 *ctx)
{
	queue((void *)ctx[BIO_QUEUE_ARG], LAST);
	return 0;
}

/*
 * A bio that ends and is not remembered. It may be a part of one that is: bio_split hands on to it
 * that its end is to be traced (BIO_TRACE_COMPLETION), and bio_chain has it point to what it is a part
 * of, which ends after it. A flush without data changes nothing; one with data has lost its flag by
 * now (dm_io_complete, md_flush_request). What is left was queued before the programs were there.
 */
INLINE void ended_unbegun(struct windows *ws, void *bio)
{
	u32 flags = FIELD(u32, bio, BIO_OPF), number;
	void *part = FIELD(void *, bio, BIO_PRIVATE);
	bool tracked = false;

	if (!CHANGES(OP(flags)) || flags & REQ_PREFLUSH)
		return;
	number = disk_number(BIO_DISK(bio));
	FOR_EACH_SLOT(ws, KIND_BIO, number, slot)
		tracked = true;
	if (!tracked)
		return;
#pragma unroll
	for (int i = 0; i < MAX_SPLITS; i++) {
		u64 key = (u64)part;

		if (bpf_map_lookup_elem(MAP(MAP_INFLIGHT), &key))
			return;
		/* It need not be a bio at all. */
		if (bpf_probe_read_kernel(&part, sizeof(part), (char *)part + BIO_PRIVATE))
			break;
	}
	FOR_EACH_SLOT(ws, KIND_BIO, number, slot) {
		if (ws->window[slot].settled)
			COUNT(slot, unbegun);
		else
			COUNT(slot, early);
	}
}

INLINE bool end_remembered(struct windows *ws, void *bio)
{
	u64 key = (u64)bio;
	volatile struct bio_range *found = bpf_map_lookup_elem(MAP(MAP_INFLIGHT), &key);

	if (!found)
		return false;
	/* Another device or operation: the address was used again, the completion meant was missed. */
	complete(ws, found, found->op != OP(FIELD(u32, bio, BIO_OPF)) ||
				    found->dev != disk_number(BIO_DISK(bio)));
	bpf_map_delete_elem(MAP(MAP_INFLIGHT), &key);
	return true;
}

int blk_bio_complete(u64 *ctx)
{
	struct windows *ws = VALUE(MAP_WINDOWS);
	void *bio = (void *)ctx[BIO_COMPLETE_ARG];

	if (PREEMPTIBLE)
		forget_seen(bio);
	if (!end_remembered(ws, bio))
		ended_unbegun(ws, bio);
	return 0;
}

/* The copies of it, which run after it: mostly there is nothing left for them to do. */
int blk_bio_complete_again(u64 *ctx)
{
	void *bio = (void *)ctx[BIO_COMPLETE_ARG];

	if (PREEMPTIBLE)
		forget_seen(bio);
	end_remembered(VALUE(MAP_WINDOWS), bio);
	return 0;
}
